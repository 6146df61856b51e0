"""Factors: sums over gradients, their eigenbases and closed-form inverses."""
