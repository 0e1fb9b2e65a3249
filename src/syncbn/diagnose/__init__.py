"""What went wrong in a run, and where first."""
