"""Matrix products that sum over very many terms.

A product whose result has few rows or columns adds up its terms one after another, and where one of them is
large the smaller ones lose digits: in float32 about three of six for a million terms. Sums of blocks that are
added up afterwards lose what a block does, and take no longer.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Terms that are added up one after another. Chosen by hand: sums keep six digits, and shorter blocks are
# slower.
_BLOCK = 2**11


def multiply_long(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left @ right``, summed block by block.

    Args:
        left: ``(..., n, P)``.
        right: ``(P, v)``, or ``(..., P, v)`` with the leading dimensions of ``left``.

    Returns:
        ``(..., n, v)``.
    """
    terms = left.shape[-1]
    blocks, rest = divmod(terms, _BLOCK)
    if terms <= _BLOCK:
        return torch.matmul(left, right)
    if right.dim() == 2 and left.dim() > 2:
        return multiply_long(left.flatten(0, -2), right).view(*left.shape[:-1], right.shape[-1])
    whole = terms - rest
    # (..., blocks, n, block) and (..., blocks, block, v)
    rows = torch.unflatten(left[..., :whole], -1, (blocks, _BLOCK)).transpose(-3, -2)
    columns = torch.unflatten(right[..., :whole, :], -2, (blocks, _BLOCK))
    result = torch.matmul(rows, columns).sum(dim=-3)
    return result + torch.matmul(left[..., whole:], right[..., whole:, :]) if rest else result
