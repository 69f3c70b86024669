"""Pretrained potentials and their model cards. Holds no code."""
