"""Tables whose rows are looked up."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from lightning_influence.model.uses.calls import tensors_of
from lightning_influence.model.uses.operations.registry import ExampleCall, register_operation
from lightning_influence.model.uses.parts import Part, Rows
from lightning_influence.model.uses.places import Place
from lightning_influence.support.notes import warn


@register_operation(
    functional.embedding,
    arguments=("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
)
def pull_embedding(call: ExampleCall) -> Mapping[str, Part] | None:
    """Pull back a look-up: the rows' gradients are those of what was looked up, except at ``padding_idx``.

    Args:
        call: of ``embedding(input, weight, padding_idx, ...)``.

    Returns:
        The rows' gradients.
    """
    if _is_scaled(call) or not call.has_place("input") or call.has_place("weight"):
        return None
    shape, padding = call.get("weight").shape, call.get("padding_idx")
    indices = call.examples("input").flatten(1)
    values = call.gradient().reshape(-1, *indices.shape, shape[1])
    if padding is not None:
        values = values * (indices != padding % shape[0])[None, :, :, None]
    return {"weight": Rows(indices, values, shape)}


def _is_scaled(call: ExampleCall) -> bool:
    """Return whether a row's gradient is divided by how often it is looked up, and tell of it."""
    if not call.get("scale_grad_by_freq", False):
        return False
    warn(
        "A table is looked up with scale_grad_by_freq=True, which divides a row's gradient by how often it "
        "comes in a batch: influence is of the gradients of each example alone."
    )
    return True


@register_operation(
    functional.embedding_bag,
    arguments=(
        "input", "weight", "offsets", "max_norm", "norm_type", "scale_grad_by_freq", "mode", "sparse",
        "per_sample_weights", "include_last_offset", "padding_idx",
    ),
)  # fmt: skip
def pull_embedding_bag(call: ExampleCall) -> Mapping[str, Part] | None:
    """Pull back sums and means of rows.

    Args:
        call: of ``embedding_bag(input, weight, offsets, ...)``.

    Returns:
        The rows' gradients: the bag's, times the row's share of it.
    """
    mode = call.get("mode", "mean")
    out = call.use.outputs[0]
    if _is_scaled(call) or call.sources() != {"weight"} or mode not in ("sum", "mean"):
        return None
    if out is None or out.dim != 0:
        return None
    tensors = tensors_of(call.use.call)
    rows, shape = tensors[call.slot("input")], call.get("weight").shape
    bags, sizes = _bags(rows, call.get("offsets"), call.use.shapes[0][0])
    share = torch.ones_like(rows.flatten(), dtype=call.gradient().dtype)
    padding = call.get("padding_idx")
    if padding is not None:
        kept = rows.flatten() != padding % shape[0]
        share, sizes = share * kept, torch.zeros_like(sizes).index_add_(0, bags, kept.to(sizes.dtype))
    if mode == "mean":
        share = share / sizes.clamp(min=1).to(share)[bags]
    weights = call.get("per_sample_weights")
    if weights is not None:
        share = share * weights.detach().flatten()
    owner = out.owner_vector(call.num_examples).to(bags.device)
    place = Place(0, owners=tuple(owner[bags].tolist()))
    K, B = len(call.gradient()), call.num_examples
    first = torch.zeros(len(owner), dtype=torch.long, device=bags.device)  # a bag's number within its example
    for example in range(B):
        mine = owner == example
        first[mine] = torch.arange(int(mine.sum()), device=bags.device)
    within = place.split(first[bags], B)
    gradient = call.gradient()  # (K, B, m, D)
    index = within[None, :, :, None].expand(K, *within.shape, gradient.shape[-1])
    values = gradient.gather(2, index) * place.split(share, B)[None, :, :, None]
    return {"weight": Rows(place.split(rows.flatten(), B), values, shape)}


def _bags(rows: Tensor, offsets: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
    """Return the bag of each row and the number of rows of each bag."""
    if rows.ndim == 2:
        bags = torch.arange(rows.shape[0], device=rows.device).repeat_interleave(rows.shape[1])
        return bags, torch.full((count,), rows.shape[1], device=rows.device)
    assert offsets is not None
    ends = torch.cat([offsets[:count], offsets.new_tensor([len(rows)])])
    if len(offsets) > count:
        ends = offsets
    sizes = ends.diff()
    return torch.arange(count, device=rows.device).repeat_interleave(sizes), sizes
