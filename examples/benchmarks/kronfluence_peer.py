"""kronfluence's EK-FAC on the tasks (``pip install --no-deps kronfluence==1.0.1`` beside the test extra).

Settings are its best here: float32 but for the eigendecompositions (its own advice), progress bars and
profiling off, all queries in one batch where memory allows, batch sizes tuned by hand.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from contender import Contender
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task as KronfluenceTask
from kronfluence.utils.dataset import DataLoaderKwargs
from meter import Stage, TensorTable, as_batch
from tasks import Task, TaskModule
from torch import Tensor, nn


class CrossEntropyTask(KronfluenceTask):
    """Sum over the batch of each example's mean cross-entropy over its positions."""

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        """Return the training loss, of sampled labels if ``sample``."""
        inputs, targets = batch
        outputs = model(inputs)
        logits = outputs.flatten(0, -2)
        if sample:
            with torch.no_grad():
                targets = torch.multinomial(logits.softmax(-1), 1)
            return nn.functional.cross_entropy(logits, targets.flatten(), reduction="sum")
        positions = targets.numel() / len(targets)
        return nn.functional.cross_entropy(logits, targets.flatten(), reduction="sum") / positions

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        """Return the loss of the queries."""
        return self.compute_train_loss(batch, model)


@dataclass(frozen=True)
class Sizes:
    """Batch sizes, and the two training-set sizes at which stages too long for a real run are measured.

    Scores have a large part that does not depend on the training set: the line needs points further apart.
    """

    factor_batch: int
    query_batch: int
    train_batch: int
    self_batch: int
    part: tuple[int, ...] = ()
    score_part: tuple[int, ...] = ()


SIZES = {
    "digits_mlp": Sizes(factor_batch=1024, query_batch=180, train_batch=1024, self_batch=1024),
    "digits_cnn": Sizes(factor_batch=64, query_batch=180, train_batch=128, self_batch=64),
    "large_mlp": Sizes(
        factor_batch=64,
        query_batch=100,
        train_batch=64,
        self_batch=64,
        part=(64, 128),
        score_part=(128, 512),
    ),
    "transformer": Sizes(factor_batch=16, query_batch=50, train_batch=50, self_batch=50),
    "resnet10": Sizes(factor_batch=32, query_batch=16, train_batch=64, self_batch=32),
    "resnet18": Sizes(factor_batch=16, query_batch=50, train_batch=50, self_batch=16),
    "language_small": Sizes(factor_batch=32, query_batch=16, train_batch=64, self_batch=32),
    "language": Sizes(factor_batch=16, query_batch=32, train_batch=32, self_batch=16),
}


class Kronfluence(Contender):
    """EK-FAC with sampled labels, one draw an example."""

    name: ClassVar[str] = "kronfluence"
    damping: ClassVar[float | None] = 1e-6
    draws: ClassVar[int] = 1

    def __init__(self, task: Task, model: TaskModule, scratch: Path) -> None:
        super().__init__(task, model, scratch)
        self.sizes = SIZES[task.name]
        network, adapter = copy.deepcopy(model.net).eval(), CrossEntropyTask()
        self.analyzer = Analyzer(
            "peer",
            prepare_model(network, adapter),
            adapter,
            cpu=True,
            log_level=logging.ERROR,
            disable_tqdm=True,
            output_dir=str(scratch),
        )
        self.analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=as_batch))
        self.factor_args = FactorArguments(strategy="ekfac")
        self.score_args = ScoreArguments(damping_factor=self.damping)
        self._complete = False
        torch.manual_seed(0)

    def settings(self) -> dict[str, str]:
        """Versions, damping, draws and batch sizes."""
        return {"damping": str(self.damping), "draws": str(self.draws), "sizes": str(self.sizes)}

    def _examples(self, count: int) -> TensorTable:
        """Return the training examples for factors, once per draw of labels."""
        tensors = (
            tensor[:count].repeat(self.draws, *[1] * (tensor.ndim - 1)) for tensor in self.task.train.tensors
        )
        return TensorTable(*tensors)

    def _covariance(self, count: int) -> None:
        self.analyzer.fit_covariance_matrices(
            "factors",
            self._examples(count),
            per_device_batch_size=self.sizes.factor_batch,
            factor_args=self.factor_args,
            overwrite_output_dir=True,
        )

    def _eigh(self, count: int) -> None:
        self.analyzer.perform_eigendecomposition(
            "factors", factor_args=self.factor_args, overwrite_output_dir=True
        )

    def _lambda(self, count: int) -> None:
        self.analyzer.fit_lambda_matrices(
            "factors",
            self._examples(count),
            per_device_batch_size=self.sizes.factor_batch,
            factor_args=self.factor_args,
            overwrite_output_dir=True,
        )

    def _scores(self, count: int) -> None:
        self._complete = count == len(self.task.train)
        self.analyzer.compute_pairwise_scores(
            "pairwise",
            "factors",
            query_dataset=self.task.queries,
            train_dataset=self.task.train.head(count),
            per_device_query_batch_size=min(self.sizes.query_batch, len(self.task.queries)),
            per_device_train_batch_size=self.sizes.train_batch,
            score_args=self.score_args,
            overwrite_output_dir=True,
        )

    def _self_influence(self, count: int) -> None:
        self.analyzer.compute_self_scores(
            "self",
            "factors",
            train_dataset=self.task.train.head(count),
            per_device_train_batch_size=self.sizes.self_batch,
            score_args=self.score_args,
            overwrite_output_dir=True,
        )

    def stages(self) -> list[Stage]:
        """Covariances, eigendecompositions, eigenvalues, scores and self-influence."""
        whole = (len(self.task.train),)
        part, score_part = (
            sizes if sizes and max(sizes) < whole[0] else whole
            for sizes in (self.sizes.part, self.sizes.score_part)
        )
        return [
            Stage("covariance", "factors", self._covariance, whole),
            Stage("eigh", "factors", self._eigh, whole),
            Stage("lambda", "factors", self._lambda, part),
            Stage("scores", "scores", self._scores, score_part),
            Stage("self-influence", "self-influence", self._self_influence, part),
        ]

    def scores(self) -> Tensor | None:
        """Pairwise scores ``(Q, N)``; kronfluence's sign is ours, its unit lacks our 1/N."""
        if not self._complete:
            return None
        loaded: dict[str, Tensor] = self.analyzer.load_pairwise_scores("pairwise")
        return loaded["all_modules"] / len(self.task.train)


class KronfluenceDefault(Kronfluence):
    """Its default damping."""

    name: ClassVar[str] = "kronfluence 1e-8"
    damping: ClassVar[float | None] = 1e-8


class Kronfluence20(Kronfluence):
    """Twenty draws of labels an example."""

    name: ClassVar[str] = "kronfluence, 20 draws"
    draws: ClassVar[int] = 20
