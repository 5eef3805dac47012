"""Pruning: scores say which weights matter, patterns which may go together, allocations how many go where."""
