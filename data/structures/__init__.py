"""Example structures and the published values they are compared with. Holds no code."""
