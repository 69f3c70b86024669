"""What ships with the package: models, example structures, published values. Holds no code."""
