"""``InfluenceModule``: a trained LightningModule together with what is needed to ask it for influence."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Self

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_influence.attributions import Attributions
from lightning_influence.collecting.store import state_from_checkpoint
from lightning_influence.curvature.spectrum import Spectrum
from lightning_influence.edits.asking import EditsParameters
from lightning_influence.engine import Engine
from lightning_influence.errors import CorruptFileError
from lightning_influence.factors.factors import Factors
from lightning_influence.measurements import Measurement
from lightning_influence.methods import Options
from lightning_influence.methods.spectrum import CurvatureName, SpectrumSettings
from lightning_influence.question import Question
from lightning_influence.results.diagnostics import Diagnostics
from lightning_influence.results.self_influence import SelfInfluence
from lightning_influence.running.loop import LoopRunner
from lightning_influence.settings import settings_of
from lightning_influence.state import InfluenceState


class InfluenceModule(EditsParameters, LightningModule):
    """A trained module that answers for its training data and can be edited, without a Trainer.

    Factors and coarse space are kept between calls, so that only the first call pays for them. The wrapped
    module is used where it is (its device, its precision) and left as it was.

    Args:
        model: the trained LightningModule.
        factors: its factors; fitted on the first call that needs them if None.
        state: everything a callback keeps (factors, training record, coarse space); overrides ``factors``.
        progress: whether passes show a progress bar.

    Example:
        >>> import torch
        >>> from lightning.pytorch import LightningModule
        >>> class Line(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(2, 1)
        ...     def training_step(self, batch, batch_idx):
        ...         return torch.nn.functional.mse_loss(self.layer(batch[0]), batch[1])
        >>> batch = (torch.randn(8, 2), torch.randn(8, 1))
        >>> InfluenceModule(Line()).scores([batch], [batch], method="exact", damping=0.1).scores.shape
        torch.Size([8, 8])
    """

    def __init__(
        self,
        model: LightningModule,
        factors: Factors | None = None,
        *,
        state: InfluenceState | None = None,
        progress: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.state = InfluenceState(factors=factors) if state is None else state
        self._progress = progress

    @classmethod
    def from_checkpoint(
        cls,
        path: str,
        model: LightningModule | type[LightningModule],
        *,
        progress: bool = False,
        **kwargs: Any,
    ) -> Self:
        """Load weights, factors and training record from a Lightning checkpoint alone.

        Args:
            path: the checkpoint.
            model: the module's class, or an instance to load the weights into.
            progress: whether passes show a progress bar.
            **kwargs: passed to ``load_from_checkpoint`` of the class.

        Returns:
            The module; without factors in the file they are fitted on first use.

        Raises:
            CorruptFileError: if the file is truncated or damaged, or no Lightning checkpoint.
        """
        checkpoint = _load(path)
        if isinstance(model, LightningModule):
            model.load_state_dict(checkpoint["state_dict"])
        else:
            model = model.load_from_checkpoint(path, map_location="cpu", **kwargs)
        return cls(model, state=state_from_checkpoint(checkpoint), progress=progress)

    def prepare(
        self,
        train_dataloaders: Any,
        *,
        method: str = "auto",
        layers: Sequence[str] | None = None,
        **options: Any,
    ) -> Self:
        """Run the passes that no query is needed for: factors, and for ``"auto"`` the coarse space.

        Args:
            train_dataloaders: the training examples: a loader, or ready-made batches.
            method: name of the method.
            layers: names or patterns of the layers to cover.
            **options: fields of :class:`~lightning_influence.methods.Options`.

        Returns:
            The module; :attr:`state` holds what was computed.
        """
        question = Question(method, layers=layers, options=settings_of(Options, options))
        with self._runner() as runner:
            Engine(runner, self.state, question).prepare(train_dataloaders)
        return self

    def fit_factors(
        self, train_dataloaders: Any, *, layers: Sequence[str] | None = None, **options: Any
    ) -> Factors:
        """Fit Kronecker factors in a pass of their own; they replace those that are there.

        Args:
            train_dataloaders: the training examples: a loader, or ready-made batches.
            layers: names or patterns of the layers to cover.
            **options: fields of :class:`~lightning_influence.methods.Options`, such as ``fisher``.

        Returns:
            The factors, which are also in :attr:`state`.
        """
        self.state = InfluenceState(record=self.state.record)
        self.prepare(train_dataloaders, method="ekfac", layers=layers, **options)
        assert self.state.factors is not None
        return self.state.factors

    def scores(
        self,
        train_dataloaders: Any,
        query_dataloaders: Any,
        *,
        method: str = "auto",
        measurement: Measurement | None = None,
        top_k: int | None = None,
        layers: Sequence[str] | None = None,
        **options: Any,
    ) -> Attributions:
        """Attribution scores, as :func:`lightning_influence.influence` computes them.

        Args:
            train_dataloaders: the training examples: a loader, or ready-made batches.
            query_dataloaders: the queries: loaders, or ready-made batches.
            method: name of the method.
            measurement: what is measured on queries.
            top_k: keep only the strongest at either end; all scores if None.
            layers: names or patterns of the layers to cover.
            **options: fields of :class:`~lightning_influence.methods.Options`, such as ``damping``.

        Returns:
            The attributions: ``scores[q, n]`` is the predicted change of the measurement on ``q`` when ``n``
            is removed.
        """
        question = Question(method, measurement, top_k, layers, settings_of(Options, options))
        with self._runner() as runner:
            return Engine(runner, self.state, question).attribute(train_dataloaders, query_dataloaders)

    def self_influence(
        self,
        train_dataloaders: Any,
        *,
        method: str = "ekfac",
        layers: Sequence[str] | None = None,
        **options: Any,
    ) -> SelfInfluence:
        """Influence of every training example on its own loss, in one pass.

        Args:
            train_dataloaders: the training examples: a loader, or ready-made batches.
            method: name of the method.
            layers: names or patterns of the layers to cover.
            **options: fields of :class:`~lightning_influence.methods.Options`.

        Returns:
            One score a training example.
        """
        question = Question(method, layers=layers, options=settings_of(Options, options))
        with self._runner() as runner:
            return Engine(runner, self.state, question).self_influence(train_dataloaders)

    def ihvp(
        self,
        train_dataloaders: Any,
        query_dataloaders: Any,
        *,
        method: str = "auto",
        measurement: Measurement | None = None,
        layers: Sequence[str] | None = None,
        **options: Any,
    ) -> tuple[dict[str, Tensor], Diagnostics]:
        """Inverse-Hessian-vector products ``(H + damping)^{-1} g_q`` of the queries' gradients.

        Args:
            train_dataloaders: the training examples that the curvature is an average over.
            query_dataloaders: the queries: loaders, or ready-made batches.
            method: name of the method.
            measurement: what is measured on queries.
            layers: names or patterns of the layers to cover.
            **options: fields of :class:`~lightning_influence.methods.Options`.

        Returns:
            By parameter name a tensor of shape ``(Q, *parameter.shape)``, and the certificate with the
            residuals.
        """
        question = Question(method, measurement, layers=layers, options=settings_of(Options, options))
        with self._runner() as runner:
            return Engine(runner, self.state, question).ihvp(train_dataloaders, query_dataloaders)

    def spectrum(
        self,
        train_dataloaders: Any,
        curvature: CurvatureName = "ggn",
        *,
        layers: Sequence[str] | None = None,
        **settings: Any,
    ) -> Spectrum:
        """Trace, leading eigenvalues, ranks and density of the curvature, with error estimates.

        Args:
            train_dataloaders: the training examples that the curvature is an average over.
            curvature: ``"ggn"`` for the Gauss-Newton matrix, or ``"hessian"``.
            layers: names or patterns of the layers to cover.
            **settings: fields of :class:`~lightning_influence.methods.spectrum.SpectrumSettings`, such as
                ``probes`` and ``steps``: it takes ``steps + 2`` passes over the data.

        Returns:
            The spectrum, which prints as a table.
        """
        question = Question(layers=layers)
        with self._runner() as runner:
            chosen = settings_of(SpectrumSettings, {"curvature": curvature, **settings})
            return Engine(runner, self.state, question).spectrum(train_dataloaders, chosen)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the wrapped module computes."""
        return self.model(*args, **kwargs)

    def _runner(self) -> LoopRunner:
        return LoopRunner(self.model, progress=self._progress)


def _load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return a Lightning checkpoint as it was saved.

    Raises:
        CorruptFileError: if it cannot be read.
        FileNotFoundError: if there is none.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # depends on where the damage is
        raise CorruptFileError(
            f"{str(path)!r} cannot be read as a Lightning checkpoint with weights_only=True: it is "
            "truncated, damaged, or "
            f"holds objects other than tensors and primitives ({type(error).__name__}: {error}). Write "
            "it again."
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise CorruptFileError(
            f"{str(path)!r} is no Lightning checkpoint: it has no 'state_dict'. Pass a file that "
            "Trainer.save_checkpoint or ModelCheckpoint wrote."
        )
    return checkpoint
