"""How a tensor lies in a file: one kind of storing a file, each of which speaks for itself."""
