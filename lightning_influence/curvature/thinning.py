"""Fewer rows and fewer gradients with the same expected sums, for collecting in the middle of a fit.

Inputs ``abar`` have a mean that most of their second moment lies in, so that some positions of every example
are kept, and scaled up. Output gradients of random seeds have none, and are independent between examples:
those of several examples are added with random signs, in whose average the products between two of them
vanish, and every example takes part. So are whole gradients, whose squares are summed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from lightning_influence.model.captured import Captured
from lightning_influence.model.layers.gradients import FactoredGradients
from lightning_influence.model.layers.layer import Layer
from lightning_influence.model.losses.draws import draw_signs

# Sums over rows take an eighth of the operations of the layer's own product on them, but of at least so many
# rows. Chosen by hand: the backward pass that the rows come from costs more, and so little that more rows
# would not show.
_ROW_SHARE, _FEWEST_ROWS = 1 / 8, 64
# Of a batch so many sums of gradients are rotated into the eigenbasis. Chosen by hand: a dozen batches then
# give a hundred, and an eigenvalue to 14%, independently of all others.
_SUMS = 8


@dataclass(frozen=True)
class ThinRows:
    """What one layer adds to its covariances in one batch.

    Attributes:
        inputs: rows ``(G, n, D_in)`` whose second moment is on average that of all examples and positions.
        outputs: rows ``(G, m, D_out)``, likewise.
        examples: ``B``.
        positions: ``B R``.
    """

    inputs: Tensor
    outputs: Tensor
    examples: int
    positions: int


def count_rows(rows: int, examples: int, own: int, other: int) -> int:
    """Return how many rows to keep, about: one an example at least.

    Args:
        rows: how many there are.
        examples: ``B``.
        own: their width.
        other: the width on the other side of the layer.
    """
    return min(rows, max(_FEWEST_ROWS, examples, int(_ROW_SHARE * rows * other / own)))


def count_sums(examples: int, positions: int) -> int:
    """Return into how many sums :func:`mix_examples` puts the examples of a batch."""
    return examples if positions == 1 else -(-examples // -(-examples // _SUMS))


def draw_positions(
    examples: int, positions: int, count: int, generator: torch.Generator | None = None
) -> Tensor:
    """Draw ``count`` different positions of each example, every choice being as likely as any other.

    Returns:
        ``(B, count)``, on the CPU.
    """
    return torch.rand(examples, positions, generator=generator).topk(count, dim=1).indices


def thin_rows(
    captured: Captured, outputs: Mapping[str, Tensor], generator: torch.Generator | None = None
) -> dict[str, ThinRows]:
    """Return rows of all layers that have output gradients.

    Args:
        captured: a batch.
        outputs: ``(G, B, R, D_out)`` by layer.
        generator: source of signs and positions.
    """
    examples, drawn = captured.num_examples, dict[tuple[int, int], Tensor]()

    def choose(layer: Layer, positions: int) -> Tensor | None:
        rows = count_rows(examples * positions, examples, layer.d_in, layer.d_out)
        key = positions, -(-rows // examples)
        if key[1] >= positions:
            return None
        if key not in drawn:  # layers with as many positions share a choice
            drawn[key] = draw_positions(examples, *key, generator)
        return drawn[key]

    result = {}
    for name, (rows, positions) in captured.recorder.inputs_at(examples, choose).items():
        layer = captured.recorder.layers[name]
        limit = count_rows(examples * outputs[name].shape[2], examples, layer.d_out, layer.d_in)
        few = thin_outputs(outputs[name], limit, generator)
        result[name] = ThinRows(rows, few, examples, examples * positions)
    return result


def thin_outputs(outputs: Tensor, limit: int, generator: torch.Generator | None = None) -> Tensor:
    """Return few rows whose second moment is on average that of all output gradients.

    Args:
        outputs: ``(G, B, R, D_out)``.
        limit: how many rows to return, about.
        generator: source of the signs and positions.

    Returns:
        ``(G, m, D_out)``; all rows as they are where they are within the limit.
    """
    groups, examples, positions, d_out = outputs.shape
    sums = max(1, limit // max(1, positions))
    if sums < examples:
        size = -(-examples // sums)
        signs = draw_signs(outputs.new_ones(examples), generator)
        mixing = _place(signs, size)
        outputs = (mixing @ outputs.reshape(groups, examples, -1)).view(groups, len(mixing), positions, d_out)
    if positions > limit:
        kept = draw_positions(1, positions, limit, generator)[0].to(outputs.device)
        outputs = outputs[:, :, kept] * (positions / limit) ** 0.5
    return outputs.reshape(groups, -1, d_out)


def mix_examples(gradients: FactoredGradients, generator: torch.Generator | None = None) -> FactoredGradients:
    """Add up the gradients of several examples with random signs.

    Args:
        gradients: of random seeds, or of any.
        generator: source of the signs.

    Returns:
        Gradients whose squares sum on average to those of the examples; as they are where an example has one
        position, whose gradient never has to be formed.
    """
    seeds, groups, examples, positions, d_out = gradients.outputs.shape
    size = -(-examples // _SUMS)
    if positions == 1 or size == 1:
        return gradients
    signs = draw_signs(gradients.outputs.new_ones(examples), generator)
    outputs, inputs = gradients.outputs * signs[:, None, None], gradients.inputs
    missing = -examples % size
    if missing:
        outputs = functional.pad(outputs, (0, 0, 0, 0, 0, missing))
        inputs = functional.pad(inputs, (0, 0, 0, 0, 0, missing))
    return replace(
        gradients,
        inputs=inputs.reshape(groups, -1, size * positions, inputs.shape[-1]),
        outputs=outputs.reshape(seeds, groups, -1, size * positions, d_out),
    )


def _place(signs: Tensor, size: int) -> Tensor:
    """Return the matrix ``(S, B)`` that adds up runs of ``size`` examples with their signs."""
    examples = len(signs)
    numbers = torch.arange(examples, device=signs.device)
    mixing = signs.new_zeros(-(-examples // size), examples)
    mixing[numbers // size, numbers] = signs
    return mixing
