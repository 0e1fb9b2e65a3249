"""Monitor: whether each rank's own statistics would do, layer by layer, while a model trains."""
