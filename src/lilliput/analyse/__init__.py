"""Analyses: (model, task) -> Finding."""
