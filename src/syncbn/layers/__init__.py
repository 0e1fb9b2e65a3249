"""The layers and the function that users call."""
