"""Curvature: Kronecker factors, operators of Gauss-Newton matrix and Hessian, coarse space, damping."""
