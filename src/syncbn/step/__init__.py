"""One training step of one layer."""
