"""`syncbn check`: one process with the whole batch, and ranks with their shares of it, compared."""
