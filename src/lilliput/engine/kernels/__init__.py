"""Kernels by operator, one idea a file. A module registers functions with `kernel`; the folder is the list."""
