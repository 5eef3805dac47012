"""Kernels by operator, one idea a file: each module registers functions with `kernel`, and the folder is the list."""
