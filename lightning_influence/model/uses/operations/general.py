"""Any operation, by automatic differentiation: each example's own call of it, all at once or one by one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp, vmap

from lightning_influence.model.uses.calls import Call, Slot, Use, outputs_of, tensors_of
from lightning_influence.model.uses.parts import Dense, Part


def pull_mapped(use: Use, gradients: list[Tensor | None], num_examples: int) -> dict[Slot, Part]:
    """Pull back by one vectorised call.

    Args:
        use: the use.
        gradients: of its outputs, ``(K, B, ...)`` split by examples.
        num_examples: ``B``.

    Returns:
        Gradients by slot of the sources.

    Raises:
        RuntimeError: or whatever else the operation raises if it has no rule for this.
    """
    split, live, sources = _prepare(use, gradients, num_examples)
    given = [gradient for gradient in gradients if gradient is not None]

    def one(own: list[Tensor], seeds: list[Tensor]) -> tuple[Tensor, ...]:
        call = use.call.replace(dict(zip(split, own, strict=True)))
        outputs, pull = vjp(_function(call, use, live), *sources)[:2]
        return vmap(lambda seed: pull(_as_outputs(seed, outputs)))(seeds)  # type: ignore[no-any-return]

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*performance drop.*")  # still the fastest way there is
        values = vmap(one, in_dims=(0, 1), out_dims=1)(list(split.values()), given)
    return {slot: Dense(value.detach()) for slot, value in zip(use.sources, values, strict=True)}


def pull_in_loop(use: Use, gradients: list[Tensor | None], num_examples: int) -> dict[Slot, Part]:
    """Pull back one example after the other, for operations without a rule to vectorise them.

    Args:
        use: as above.
        gradients: as above.
        num_examples: ``B``.

    Returns:
        As above.
    """
    split, live, sources = _prepare(use, gradients, num_examples)
    rows: list[list[tuple[Tensor, ...]]] = []
    devices = [sources[0].device] if sources[0].is_cuda else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():  # an operation may draw
        for example in range(num_examples):
            call = use.call.replace({slot: tensor[example] for slot, tensor in split.items()})
            leaves = [source.clone().requires_grad_() for source in sources]
            outputs = _function(call, use, live)(*leaves)
            rows.append(_backwards(outputs, leaves, [gradients[number] for number in live], example))
    return {
        slot: Dense(torch.stack([torch.stack([seed[at] for seed in row]) for row in rows], dim=1))
        for at, slot in enumerate(use.sources)
    }


def _backwards(
    outputs: tuple[Tensor, ...], leaves: list[Tensor], gradients: list[Any], example: int
) -> list[tuple[Tensor, ...]]:
    """Return the leaves' gradients for each of the seeds."""
    return [
        torch.autograd.grad(
            outputs, leaves, _as_outputs([gradient[seed, example] for gradient in gradients], outputs),
            retain_graph=True, allow_unused=True, materialize_grads=True,
        )
        for seed in range(len(gradients[0]))
    ]  # fmt: skip


def _as_outputs(seeds: Sequence[Tensor], outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return seeds as complex numbers where the outputs are: zeros may be given as real ones."""
    return tuple(
        seed.to(output.dtype) if output.is_complex() else seed
        for seed, output in zip(seeds, outputs, strict=True)
    )


def _prepare(
    use: Use, gradients: list[Tensor | None], num_examples: int
) -> tuple[dict[Slot, Tensor], list[int], list[Tensor]]:
    tensors = tensors_of(use.call)
    split = {slot: place.split(tensors[slot], num_examples, fill=True) for slot, place in use.places.items()}
    live = [number for number, gradient in enumerate(gradients) if gradient is not None]
    return split, live, [source.detach() for source in use.sources.values()]


def _function(call: Call, use: Use, live: list[int]) -> Callable[..., tuple[Tensor, ...]]:
    """Return the call as a function of its sources, which leaves its arguments as they are."""

    def function(*sources: Tensor) -> tuple[Tensor, ...]:
        own = call.replace({**use.literals, **dict(zip(use.sources, sources, strict=True))})
        if not use.inplace:
            outputs = outputs_of(own.run())
            return tuple(outputs[number] for number in live)
        target = own.changed()
        assert target is not None
        fresh = target.clone()
        own = own.replace({slot: fresh for slot, t in tensors_of(own).items() if t is target})
        result = own.run()
        return (fresh if result is None else outputs_of(result)[0],)

    return function
