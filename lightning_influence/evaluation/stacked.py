"""Training many small models at once: their parameters are stacked, their steps taken together.

A model of a few thousand parameters leaves a CPU waiting for Python; ``K`` of them in one batched product do
not. Each member has its own examples; its initial values and its order of batches follow from its seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from lightning_influence.evaluation.fresh import check_distinct_models
from lightning_influence.evaluation.losses import cross_entropy
from lightning_influence.evaluation.optimizers import StackedOptimizer
from lightning_influence.evaluation.recipe import Recipe, batch_orders, run_seed
from lightning_influence.support.arguments import check_losses
from lightning_influence.support.errors import NonFiniteError, UnsupportedModelError

Factory = Callable[[], nn.Module]
ExampleLoss = Callable[[Tensor, Tensor], Tensor]
Stacked = dict[str, Tensor]


@dataclass(frozen=True)
class Member:
    """One training run: the examples it keeps, boolean ``(N,)``, and its seed."""

    mask: Tensor
    seed: int


def build(factory: Factory, member: Member) -> nn.Module:
    """Freshly initialised model of a member, the same for every member with this seed.

    The global random state is left as it was.

    Args:
        factory: makes a model, drawing its initial values from torch's global CPU generator.
        member: whose seed decides the initial values.

    Returns:
        The model, in training mode.

    Raises:
        UnsupportedModelError: if the model keeps running statistics, which stacked training cannot update.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run_seed(member.seed, "init"))
        model = factory().train()
    for name, module in model.named_modules():
        if getattr(module, "running_mean", None) is not None:
            raise UnsupportedModelError(
                f"Layer {name!r} ({type(module).__name__}) updates running statistics, which training many "
                "models at once cannot do. Use track_running_stats=False, or another normalisation."
            )
    return model


def stack_state(models: Sequence[nn.Module]) -> Stacked:
    """Return copies of the parameters and buffers of ``K`` like models, stacked to ``(K, ...)`` each."""
    tables = [{**dict(model.named_parameters()), **dict(model.named_buffers())} for model in models]
    return {name: torch.stack([table[name].detach() for table in tables]) for name in tables[0]}


def stacked_outputs(model: nn.Module, parameters: Stacked, inputs: Tensor, *, shared: bool) -> Tensor:
    """Outputs of ``K`` models.

    Args:
        model: the architecture; its own values are used only for what is not in ``parameters``.
        parameters: stacked parameters and buffers, ``(K, ...)`` each.
        inputs: ``(B, ...)`` for all models if ``shared``, else ``(K, B, ...)``.
        shared: whether every model sees the same inputs.

    Returns:
        Outputs, ``(K, B, ...)``.
    """

    def forward(values: Stacked, x: Tensor) -> Tensor:
        outputs: Tensor = functional_call(model, values, (x,))
        return outputs

    batched = vmap(forward, in_dims=(0, None if shared else 0), randomness="different")
    result: Tensor = batched(parameters, inputs)
    return result


def _build_all(factory: Factory, members: Sequence[Member]) -> list[nn.Module]:
    """Return every member's model, of a factory that gives each run parameters of its own."""
    models = [build(factory, member) for member in members]
    # One model alone cannot tell. What is frozen the runs may share: training works on copies.
    others = models[1:] or [build(factory, members[0])]
    for model, other in zip(models, others, strict=False):
        check_distinct_models(model, other, frozen=False)
    return models


def _schedule(members: Sequence[Member], recipe: Recipe) -> Tensor:
    """Return the indices of every step, ``(K, steps, B)``; -1 where a batch is short or a run is over."""
    rows = []
    for member in members:
        padding = -int(member.mask.sum()) % recipe.batch_size
        orders = [
            nn.functional.pad(order, (0, padding), value=-1)
            for order in batch_orders(member.mask, recipe, member.seed)
        ]
        rows.append(torch.cat(orders).to(torch.int32).view(-1, recipe.batch_size))
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)


def _batches(schedule: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield indices and weights of every step, ``(K, B)``; weights sum to 1, or 0 once a run is over."""
    for index in schedule.unbind(1):
        valid = index >= 0
        width = int(valid.sum(1).max())
        valid = valid[:, :width]
        yield index[:, :width].clamp(min=0).long(), valid / valid.sum(1, keepdim=True).clamp(min=1)


def train_members(
    factory: Factory,
    recipe: Recipe,
    data: tuple[Tensor, Tensor],
    members: Sequence[Member],
    loss: ExampleLoss = cross_entropy,
) -> Stacked:
    """Train ``K`` models at once, each as a run of its own would.

    Args:
        factory: makes a freshly initialised model whose ``forward`` takes a batch of inputs.
        recipe: optimizer, schedule, epochs and batch size.
        data: inputs ``(N, ...)`` and targets ``(N, ...)``.
        members: the runs; they may keep different numbers of examples.
        loss: per-example training loss of outputs and targets, ``(B,)``.

    Returns:
        The trained parameters, frozen ones and buffers with them, each stacked to ``(K, ...)``.

    Raises:
        ValueError: if there is no member, one keeps nothing, or the loss is not per example.
        UnsupportedModelError: if the factory does not make a model of its own for each run.
        NonFiniteError: if a run diverged.
    """
    if not members or not all(bool(member.mask.any()) for member in members):
        raise ValueError("Retraining needs at least one run, and every run at least one kept example.")
    models = _build_all(factory, members)
    state, template = stack_state(models), models[0]
    leaves = {
        name: state[name].requires_grad_() for name, p in template.named_parameters() if p.requires_grad
    }
    optimizer = StackedOptimizer(leaves, recipe)
    totals = [recipe.steps(int(member.mask.sum())) for member in members]
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(run_seed(members[0].seed, "noise"))
        for step, (index, weight) in enumerate(_batches(_schedule(members, recipe))):
            outputs = stacked_outputs(template, state, data[0][index], shared=False)
            losses = loss(outputs.flatten(0, 1), data[1][index].flatten(0, 1))
            check_losses(losses, index.numel(), "loss")
            total = losses @ weight.to(losses).flatten()
            rates = torch.tensor([recipe.rate(step, steps) for steps in totals], dtype=torch.float64)
            optimizer.step(torch.autograd.grad(total, list(leaves.values())), rates)
    trained = {name: value.detach() for name, value in state.items()}
    for row, member in enumerate(members):
        # Buffers may be infinite by design: an attention mask is.
        if not all(bool(trained[name][row].isfinite().all()) for name in leaves):
            raise NonFiniteError(
                f"The run with seed {member.seed} on {int(member.mask.sum())} examples diverged: its "
                "parameters are not finite. Lower the recipe's learning rate."
            )
    return trained
