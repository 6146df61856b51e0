"""How much of the gradient the parameters that an answer leaves out have: what their number does not tell."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from lightning_influence.model.layers.plan import ModuleLoss
from lightning_influence.model.training_step import call_loss
from lightning_influence.support.coordinates import square_norm
from lightning_influence.support.passes import Loader, Passes
from lightning_influence.support.whole import holds_stand_ins


class SquaresPass:
    """Squares the gradient of the training loss of a batch, by one ordinary backward pass.

    Args:
        chosen: the parameters whose share is asked for.
        loss: in place of the module's own; None for that.

    Attributes:
        squares: ``(2,)`` in float64: of the chosen ones, and of all trainable parameters.
    """

    description = "Influence: share of what is left out"

    def __init__(self, chosen: Collection[Tensor], loss: ModuleLoss | None) -> None:
        self._chosen, self._loss = {id(parameter) for parameter in chosen}, loss
        self.squares = torch.zeros(2, dtype=torch.float64)

    def step(self, module: Any, batch: Any, indices: Tensor, dataloader_idx: int) -> None:
        """Add one batch; nothing where it cannot be differentiated as it is."""
        if holds_stand_ins(module):  # no process has whole gradients
            return
        parameters = [p for p in module.parameters() if p.requires_grad]
        try:
            with torch.enable_grad():
                values, total = (None, self._loss(module, batch)) if self._loss else call_loss(module, batch)
                loss = values if values is not None else total
                assert loss is not None
                grads = torch.autograd.grad(loss.sum(), parameters, allow_unused=True)
        except Exception:  # whatever the user's model may raise; the answer itself does not depend on it
            return
        for parameter, grad in zip(parameters, grads, strict=True):
            square = 0.0 if grad is None else square_norm(grad.to_dense())
            self.squares += torch.tensor([square * (id(parameter) in self._chosen), square]).double()


def measure_gradient_share(
    runner: Passes, train: Loader, chosen: Collection[Tensor], loss: ModuleLoss | None
) -> float | None:
    """Return the share of some parameters of the squared gradient of the first training batch.

    Args:
        runner: runs the pass.
        train: the training examples.
        chosen: the parameters.
        loss: in place of the module's own; None for that.

    Returns:
        In [0, 1]; None where it cannot be had, as of parameters that processes share.
    """
    one_pass = SquaresPass(chosen, loss)
    runner.run(one_pass, train.parts(-(-train.num_examples // len(train)))[0])
    own, whole = runner.all_reduce_sum(one_pass.squares).tolist()
    return own / whole if whole > 0 else None
