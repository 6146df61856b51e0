"""Symmetric matrices whose spectrum is known."""

from __future__ import annotations

import torch

P = 60
DOUBLE = torch.float64


def matrix(values, seed=0):
    """A symmetric matrix with these eigenvalues and random eigenvectors, and products with it."""
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(len(values), len(values), dtype=DOUBLE, generator=generator)).Q
    H = Q @ torch.diag(values) @ Q.T
    return H, lambda v: (v.double() @ H).to(v.dtype)


def decaying(count=P):
    return 4.0 / torch.arange(1, count + 1, dtype=DOUBLE) ** 1.5


def indefinite(count=P):
    return torch.cat([decaying(count - 5), -torch.tensor([1.5, 0.3, 0.2, 0.1, 0.05], dtype=DOUBLE)])


def covered(estimates, truth, sigmas):
    """Share of the estimates that are within so many of their own standard errors."""
    return sum(abs(e.value - truth) <= sigmas * e.error for e in estimates) / len(estimates)
