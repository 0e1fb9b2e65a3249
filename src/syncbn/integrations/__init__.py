"""Plugins for frameworks, each imported by its own name: importing syncbn imports none of them."""
