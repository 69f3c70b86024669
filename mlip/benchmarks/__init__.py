"""What ``mlip bench`` measures."""
