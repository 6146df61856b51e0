"""Solvers: damped curvature systems, and scores of what they return."""
