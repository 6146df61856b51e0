"""dattri-llm 0.1.0 on the tasks: EK-FAC of linear and convolutional layers; runs in its own environment.

Its Fisher is that of the training labels. It has no self-influence.
"""

from __future__ import annotations

import re
import shutil
import warnings
from typing import Any, ClassVar

from dattri_llm import AttributionArguments, AttributionTask, EKFACAttributor, HookManagerConfig
from meter import Stage, TensorTable
from torch import Tensor, nn
from torch.utils.data import Dataset
from worker import Job, Peer, example_loss, main


class Examples(Dataset[tuple[Tensor, Tensor]]):
    """Examples one by one: its hashes of examples need the default collation."""

    def __init__(self, table: TensorTable) -> None:
        self.table = table

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.table[index]


class EKFAC(Peer):
    """EK-FAC; its default damping is 1e-3, and may be relative to the mean eigenvalue."""

    name: ClassVar[str] = "dattri-llm"
    untuned: ClassVar[str] = "damping 0.001"
    # Absolute or relative to the mean eigenvalue of a layer.
    dampings: ClassVar[tuple[tuple[float, bool], ...]] = (
        (1e-3, False),
        (1e-2, False),
        (1e-1, True),
        (1e-2, True),
    )

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        size = min(job.pass_batch, 256)
        arguments = AttributionArguments(
            output_dir=str(job.scratch),
            per_device_train_batch_size=size,
            per_device_eval_batch_size=len(job.queries),
            use_cpu=True,
        )

        def loss(model: nn.Module, batch: Any) -> Tensor:
            return example_loss(model(batch[0]), batch[1])

        self.attributor = EKFACAttributor(arguments, task=AttributionTask(loss, job.net))
        # All that EK-FAC uses; by default embeddings and norms are watched as well, and then ignored.
        kinds = (nn.Linear, nn.Conv2d)
        names = [f"{re.escape(name)}$" for name, layer in job.net.named_modules() if isinstance(layer, kinds)]
        self.hooks = HookManagerConfig(linear_io=names)
        self.train, self.queries = Examples(job.train), Examples(job.queries)
        self.fisher = job.scratch / "fisher"
        self.found: dict[str, Tensor] = {}
        self.size = size

    def _factors(self, count: int) -> None:
        shutil.rmtree(self.fisher, ignore_errors=True)
        with self.attributor.generate_train_rep(self.train, hook_config=self.hooks) as source:
            factors, fisher = self.attributor.fit_raw(source)
        self.attributor.save_fisher(factors, str(self.fisher), fisher=fisher)

    def _attribute(self, damping: float, relative: bool) -> None:
        found = self.attributor.attribute(
            self.train,
            self.queries,
            hook_config=self.hooks,
            damping=damping,
            relative_damping=relative,
            fisher_dir=str(self.fisher),
        )
        label = f"damping {damping:g}{' of the mean eigenvalue' if relative else ''}"
        self.found[label] = self._in_order(found)

    def _in_order(self, found: Any) -> Tensor:
        """Return scores ``(Q, N)``, in the order of the data."""
        if found.num_rows != len(self.train):
            raise ValueError(f"{found.num_rows} rows for {len(self.train)} examples")
        return found.scores.T.detach().cpu()

    def stages(self) -> list[Stage]:
        """Factors and scores."""
        whole = (len(self.job.train),)
        return [
            Stage("factors", "factors", self._factors, whole),
            Stage("scores", "scores", lambda count: self._attribute(*self.dampings[0]), whole),
        ]

    def scores(self) -> dict[str, Tensor]:
        """Scores of every damping."""
        for damping in self.dampings[1:]:
            self._attribute(*damping)
        return self.found

    def settings(self) -> dict[str, str]:
        """Layers and batches."""
        return {"layers": "linear, convolutional", "batches": str(self.size)}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main({"ekfac": EKFAC})
