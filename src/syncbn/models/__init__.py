"""Whole models: converted, masked, replicated."""
