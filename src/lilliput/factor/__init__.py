"""Factorisation: one tensor as a product of smaller ones."""
