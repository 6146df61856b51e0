"""dattri 0.3.0 on the tasks: EK-FAC, CG and LoGra. Runs in an environment of its own (see ``foreign.py``).

Its EK-FAC takes linear layers with one position an example. CG solves with the Hessian of one batch, which
is given the whole training set. LoGra projects gradients of linear layers and inverts their second moments.
"""

from __future__ import annotations

import warnings
from typing import ClassVar

import torch
from dattri.algorithm import IFAttributorCG, IFAttributorEKFAC, LoGraAttributor
from dattri.task import AttributionTask
from meter import Stage
from torch import Tensor, nn
from worker import Job, Peer, UnansweredError, example_loss, main

# A vector of parameters for each example and each query: more than this many bytes do not fit.
LARGEST = 6 * 2**30


class Adapted(nn.Module):
    """A network as LoGra calls it.

    It sees shapes from one example without a batch dimension, and its own cross-entropy of queries needs
    logits of tokens as ``(B, C, T)``.
    """

    def __init__(self, net: nn.Module, ndim: int) -> None:
        super().__init__()
        self.net, self.ndim = net, ndim

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits."""
        outputs: Tensor = self.net(inputs if inputs.ndim == self.ndim else inputs[None])
        return outputs.transpose(1, 2) if outputs.ndim > 2 else outputs


def _functional_task(job: Job) -> AttributionTask:
    def loss(params: dict[str, Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = data
        outputs = torch.func.functional_call(job.net, params, inputs)
        return nn.functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())

    return AttributionTask(loss_func=loss, model=job.net, checkpoints=dict(job.net.state_dict()))


class _InnerProducts(Peer):
    """What EK-FAC and CG share: the answer is a matrix of inner products, made in one go."""

    dampings: ClassVar[tuple[float, ...]]
    query_batch: ClassVar[int | None] = None  # all of them

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        pairs = 4 * (len(job.train) + len(job.queries)) * sum(p.numel() for p in job.net.parameters())
        if pairs > LARGEST:
            raise UnansweredError(f"holds a gradient of each example at once: {pairs / 2**30:.0f} GiB")
        self.task = _functional_task(job)
        self.found: dict[str, Tensor] = {}

    def _attribute(self, attributor: IFAttributorEKFAC | IFAttributorCG) -> Tensor:
        train = self.job.loader(self.job.train, len(self.job.train))
        queries = self.job.loader(self.job.queries, self.query_batch or len(self.job.queries))
        return attributor.attribute(train, queries).T.detach()

    def _self(self, attributor: IFAttributorEKFAC | IFAttributorCG) -> None:
        # More than one batch fails inside.
        attributor.self_attribute(self.job.loader(self.job.train, len(self.job.train)))

    def scores(self) -> dict[str, Tensor]:
        """Scores of every damping."""
        return self.found


class EKFAC(_InnerProducts):
    """EK-FAC from the training labels; its default damping is 0."""

    name: ClassVar[str] = "dattri-ekfac"
    untuned: ClassVar[str] = "damping 0"
    dampings: ClassVar[tuple[float, ...]] = (1e-2, 1e-4, 0.0)

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        if job.tokens:
            raise UnansweredError("EK-FAC fails on inputs of more than one position")
        self.attributor = IFAttributorEKFAC(self.task, damping=self.dampings[0])

    def _factors(self, count: int) -> None:
        self.attributor.cache(self.job.loader(self.job.train))

    def _pairs(self, count: int) -> None:
        self.attributor.damping = self.dampings[0]
        self.found[f"damping {self.dampings[0]:g}"] = self._attribute(self.attributor)

    def stages(self) -> list[Stage]:
        """Factors, scores, self-influence."""
        whole = (len(self.job.train),)
        return [
            Stage("factors", "factors", self._factors, whole),
            Stage("scores", "scores", self._pairs, whole),
            Stage("self-influence", "self-influence", lambda count: self._self(self.attributor), whole),
        ]

    def scores(self) -> dict[str, Tensor]:
        """Scores of every damping, from the same factors."""
        for damping in self.dampings[1:]:
            self.attributor.damping = damping
            self.found[f"damping {damping:g}"] = self._attribute(self.attributor)
        return self.found

    def settings(self) -> dict[str, str]:
        """Layers and batches."""
        return {"layers": "linear", "batches": f"factors {self.job.pass_batch}, else one"}


class CG(_InnerProducts):
    """CG on the Hessian of the whole training set, 50 steps; its defaults are 10 steps without damping."""

    name: ClassVar[str] = "dattri-cg"
    untuned: ClassVar[str] = "10 steps, damping 0"
    dampings: ClassVar[tuple[float, ...]] = (3e-3, 3e-2)
    query_batch: ClassVar[int | None] = 10  # each has the whole training set's graph to itself

    def _solver(self, damping: float, steps: int) -> IFAttributorCG:
        attributor = IFAttributorCG(self.task, max_iter=steps, regularization=damping)
        attributor.cache(self.job.loader(self.job.train, len(self.job.train)))
        return attributor

    def _pairs(self, damping: float, steps: int) -> None:
        found = self._attribute(self._solver(damping, steps))
        self.found[f"{steps} steps, damping {damping:g}"] = found

    def stages(self) -> list[Stage]:
        """Scores alone: nothing is prepared, and self-influence is a solve for each example."""
        run = lambda count: self._pairs(self.dampings[0], 50)  # noqa: E731
        return [Stage("scores", "scores", run, (len(self.job.train),))]

    def scores(self) -> dict[str, Tensor]:
        """Scores of every damping, and of the defaults."""
        for damping in self.dampings[1:]:
            self._pairs(damping, 50)
        self._pairs(0.0, 10)
        return self.found


class LoGra(Peer):
    """LoGra, its default damping 1e-5 of the mean eigenvalue.

    Its default projection, 64 x 64 a layer, inverts a matrix of order 4,096 for each, which takes longer here
    than all the rest; these layers are small, and get 32 x 32.
    """

    name: ClassVar[str] = "dattri-logra"
    untuned: ClassVar[str] = "damping default"
    dampings: ClassVar[tuple[float | None, ...]] = (0.1, 1e-3, None)

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.net = Adapted(job.net, job.train.tensors[0].ndim)
        self.found: dict[str, Tensor] = {}
        # What it compiles is compiled before anything is measured.
        few = job.train.head(2 * job.pass_batch)
        self._prepare(0.1, few).attribute(job.loader(few), self._queries())

    def _queries(self) -> object:
        return self.job.loader(self.job.queries, len(self.job.queries))

    def _prepare(self, damping: float | None, table: object = None) -> LoGraAttributor:
        def loss(model: nn.Module, batch: tuple[Tensor, Tensor], device: str) -> Tensor:
            return example_loss(model.net(batch[0]), batch[1])  # type: ignore[operator]

        state = dict(self.net.state_dict())
        task = AttributionTask(loss_func=loss, model=self.net, checkpoints=state)
        attributor = LoGraAttributor(task, damping=damping, proj_dim=1024, offload="none")
        attributor.cache(self.job.loader(table or self.job.train))  # type: ignore[arg-type]
        return attributor

    def _factors(self, count: int) -> None:
        self.attributor = self._prepare(self.dampings[0])

    def _attribute(self) -> Tensor:
        return self.attributor.attribute(self.job.loader(self.job.train), self._queries()).T.detach()

    def _pairs(self, count: int) -> None:
        self.found[f"damping {self.dampings[0]:g}"] = self._attribute()

    def stages(self) -> list[Stage]:
        """Projected gradients and their inverse second moments, scores, self-influence."""
        whole = (len(self.job.train),)
        self_influence = lambda count: self.attributor.compute_self_attribution()  # noqa: E731
        return [
            Stage("factors", "factors", self._factors, whole),
            Stage("scores", "scores", self._pairs, whole),
            Stage("self-influence", "self-influence", self_influence, whole),
        ]

    def scores(self) -> dict[str, Tensor]:
        """Scores of every damping."""
        for damping in self.dampings[1:]:
            self.attributor = self._prepare(damping)
            self.found[f"damping {'default' if damping is None else damping}"] = self._attribute()
        return self.found

    def settings(self) -> dict[str, str]:
        """Layers and projection."""
        return {"layers": "linear", "projection": "32 x 32"}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main({"ekfac": EKFAC, "cg": CG, "logra": LoGra})
