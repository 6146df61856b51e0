"""Curvature: passes for the Gauss-Newton matrix, as products on many vectors at once or dense."""
