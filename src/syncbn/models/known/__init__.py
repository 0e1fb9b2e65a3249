"""Classes of other libraries, known by their qualified names: nothing here imports a library."""
