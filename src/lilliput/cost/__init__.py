"""Costs that never mix: counted exactly, measured on a machine, or estimated by a named model."""
