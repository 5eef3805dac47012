"""Costs that never mix: counted exactly, or measured on a machine."""
