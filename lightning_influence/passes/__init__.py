"""Passes: what is computed from every batch, through the forward pass of the user's module under capture."""
