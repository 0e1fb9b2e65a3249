"""syncbn bench: one layer's time on this machine, beside its peers', and where it goes."""
