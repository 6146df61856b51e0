"""Linear algebra on tensors and closures: systems, eigenvalues, traces and descent."""
