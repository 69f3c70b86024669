"""Feed training: batches under a budget, flat tensors, workers, several data sets mixed."""
