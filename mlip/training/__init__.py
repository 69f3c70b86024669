"""Fit a potential to a data set: configuration, batches, losses, the Lightning loop, resume."""
