"""Batches of any nesting: walked, scattered, sent, emptied."""
