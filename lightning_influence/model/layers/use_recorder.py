"""What a recorder of layers needs of whoever has their gradients from single operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor
from torch.autograd.graph import GradientEdge

from lightning_influence.model.layers.gradients import LayerGradients
from lightning_influence.model.uses.places import Place

#: Output gradients ``(G, B, R, D_out)`` of a layer; of a table those of the rows that were looked up,
#: ``(1, B, R, D)``, and of what it maps to, ``(1, B, S, V)``.
Slopes = tuple[Tensor, ...]


class UseRecorder(Protocol):
    """Has gradients of layers from the operations that use their weights, in place of calls of modules."""

    @property
    def heard(self) -> list[str]:
        """Names of the layers that it has, and that took part in the forward pass."""
        ...

    @property
    def picks(self) -> bool:
        """Whether the step has picked rows by values, which are others in the next batch."""
        ...

    @property
    def coincidences(self) -> set[str]:
        """Where several dimensions have the batch's size: it is a guess which one is the examples'."""
        ...

    @property
    def is_needed(self) -> bool:
        """Whether some layers are not had from calls of modules on the batch, or may not be in the next."""
        ...

    @property
    def activations(self) -> list[GradientEdge]:
        """Where gradients of outputs that belong to examples arrive."""
        ...

    def add_example(self, batch: Any, number: int) -> None:
        """Take the tensors of a batch of one for those of an example."""
        ...

    def count_calls(self) -> dict[str, int]:
        """How often each layer that it has is used, but for those whose rows were picked by values."""
        ...

    def take_penalties(self) -> list[Tensor]:
        """Numbers, made of weights alone, that were added to those of examples; forgotten as uses."""
        ...

    def spread(self, key: str) -> Tensor:
        """Give a parameter a row for each example, ``(B, *shape)``, to which gradients can be sent."""
        ...

    def is_in_order(self, tensor: Tensor) -> bool:
        """Whether the rows of a tensor are known to be the examples in their order."""
        ...

    def place_of(self, tensor: Tensor) -> Place | None:
        """Where the examples stand in a tensor of the forward pass, or None if that is not known."""
        ...

    def certify(self, values: Tensor) -> None:
        """Check the gradients of the examples' values ``(B,)``."""
        ...

    def __enter__(self) -> object:
        """Begin to watch."""
        ...

    def __exit__(self, *details: Any) -> None:
        """Stop watching."""
        ...

    def close(self, calls: Mapping[str, int]) -> set[str]:
        """Choose the modules that it has, knowing how often each was called, and return their names."""
        ...

    def clear(self) -> None:
        """Let go of what was recorded."""
        ...

    def edges(self) -> list[GradientEdge]:
        """Where a backward pass is to be differentiated."""
        ...

    def inputs(self, name: str) -> Tensor | None:
        """Inputs ``(G, B, R, D_in)`` of a layer; None for a table."""
        ...

    def pull(self, outputs: Tensor, seed: Tensor | None, found: Sequence[Tensor | None]) -> dict[str, Slopes]:
        """Output gradients by layer, from the gradients ``found`` at the edges."""
        ...

    def assemble(self, name: str, slopes: Slopes) -> LayerGradients:
        """Gradients of a layer from output gradients ``(K, G, B, R, D_out)``."""
        ...
