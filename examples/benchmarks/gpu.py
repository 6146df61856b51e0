"""What influence costs on an accelerator: ResNets and a language model of the size of GPT-2 small, made here.

    python examples/benchmarks/gpu.py [--tiny] [--seconds 420] [--json FILE] [model ...]

Nothing is downloaded: weights and data are random, which no cost depends on. Each stage is measured in
seconds, in plain epochs of the same run (a fit without the callback), and by the most memory that tensors
took on the accelerator. Stages that would begin after the given seconds are left out and named. Without an
accelerator the sizes are those of ``--tiny``, and the output says so: such figures show that the script runs
and nothing else. kronfluence is measured beside where it is installed
(``pip install --no-deps kronfluence==1.0.1``).
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from large_nets import LanguageModel, make_resnet
from lightning.pytorch import LightningModule, Trainer
from tasks import TensorTable, as_batch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_influence import InfluenceCallback, InfluenceModule

try:  # the peer is optional
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.utils.dataset import DataLoaderKwargs
    from kronfluence_peer import CrossEntropyTask
except ImportError:
    Analyzer = None


@dataclass(frozen=True)
class Case:
    """A model with its data.

    Attributes:
        make: returns the network.
        shape: of one example's inputs.
        classes: of which labels are drawn; of inputs, too, where these are tokens.
        is_language: whether every position has a label.
        train: number of training examples.
        queries: number of queries.
        batch: size of batches.
        layers: which layers are covered.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    classes: int
    is_language: bool
    train: int
    queries: int
    batch: int
    layers: list[str]

    def draw(self, count: int, seed: int) -> TensorTable:
        """Return random examples."""
        generator = torch.Generator().manual_seed(seed)
        if self.is_language:
            tokens = torch.randint(self.classes, (count, self.shape[0] + 1), generator=generator)
            return TensorTable(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        images = torch.randn(count, *self.shape, generator=generator)
        return TensorTable(images, torch.randint(self.classes, (count,), generator=generator))


# The head of 50,257 outputs and the embeddings are left out: a covariance of the former takes 10 GiB.
LAYERS = ["net.blocks.*.q", "net.blocks.*.k", "net.blocks.*.v", "net.blocks.*.o"]
LAYERS += ["net.blocks.*.up", "net.blocks.*.down"]
CONVOLUTIONS = ["net.*"]
CASES = {
    "resnet18": Case(
        lambda: make_resnet((2, 2, 2, 2), 64, bottleneck=False),
        (3, 32, 32), 10, False, 2000, 50, 100, CONVOLUTIONS,
    ),
    "resnet50": Case(
        lambda: make_resnet((3, 4, 6, 3), 64, bottleneck=True),
        (3, 32, 32), 10, False, 500, 20, 50, CONVOLUTIONS,
    ),
    "gpt2": Case(
        lambda: LanguageModel(50257, 256, 768, 12, 12), (256,), 50257, True, 256, 8, 8, LAYERS
    ),
}  # fmt: skip
TINY = {
    "resnet18": Case(
        lambda: make_resnet((1, 1), 4, bottleneck=False), (3, 8, 8), 10, False, 16, 3, 8, CONVOLUTIONS
    ),
    "resnet50": Case(
        lambda: make_resnet((1, 1), 2, bottleneck=True), (3, 8, 8), 10, False, 16, 3, 8, CONVOLUTIONS
    ),
    "gpt2": Case(lambda: LanguageModel(20, 6, 8, 2, 1), (6,), 20, True, 16, 3, 8, LAYERS),
}


class Task(LightningModule):
    """Next-token or class cross-entropy."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int = 0) -> Tensor:
        """Return the loss."""
        logits = self.net(batch[0])
        return nn.functional.cross_entropy(logits.flatten(0, -2), batch[1].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Clock:
    """Measures stages on a device, until its time is spent.

    Args:
        device: where stages run.
        seconds: how long stages may begin.
    """

    def __init__(self, device: torch.device, seconds: float) -> None:
        self._device, self._end = device, time.perf_counter() + seconds

    def measure(self, stage: Callable[[], object]) -> dict[str, Any]:
        """Return a stage's seconds and peak memory, or why there are none."""
        if time.perf_counter() > self._end:
            return {"left_out": "the time was spent"}
        on_cuda = self._device.type == "cuda"
        if on_cuda:
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
        start = time.perf_counter()
        try:
            stage()
        except torch.OutOfMemoryError as error:
            return {"left_out": str(error).partition("\n")[0]}
        if on_cuda:
            torch.cuda.synchronize(self._device)
        found: dict[str, Any] = {"seconds": time.perf_counter() - start}
        if on_cuda:
            found["peak_mib"] = torch.cuda.max_memory_allocated(self._device) / 2**20
        return found


def fit(case: Case, device: torch.device, epochs: int, callbacks: list[Any]) -> Task:
    """Fit a new model.

    Returns:
        The model, on the CPU, where a Trainer leaves it.
    """
    torch.manual_seed(0)
    module = Task(case.make())
    quiet = dict.fromkeys(
        ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False
    )
    accelerator = "gpu" if device.type == "cuda" else "cpu"
    trainer = Trainer(accelerator=accelerator, devices=1, max_epochs=epochs, callbacks=callbacks, **quiet)
    trainer.fit(module, load(case.draw(case.train, 1), case.batch))
    return module


def load(table: TensorTable, batch: int) -> DataLoader[Any]:
    """Return a loader of whole batches at a time."""
    return DataLoader(table, batch, collate_fn=as_batch)


def run_kronfluence(case: Case, module: Task, clock: Clock, device: torch.device) -> dict[str, Any]:
    """Measure the peer's factors and scores on the same layers, linear ones and convolutions.

    Returns:
        The stages.
    """
    with tempfile.TemporaryDirectory() as folder:
        adapter = CrossEntropyTask()
        kept = {name for name, _ in module.named_modules()}
        if case.is_language:
            kept = {name for name in kept if ".blocks." in name}
        names = [
            name.removeprefix("net.")
            for name, part in module.named_modules()
            if name in kept and isinstance(part, nn.Linear | nn.Conv2d)
        ]
        adapter.get_influence_tracked_modules = lambda: names  # type: ignore[method-assign]
        network = prepare_model(module.net.eval(), adapter)
        options = {"cpu": device.type == "cpu", "disable_tqdm": True, "log_level": logging.ERROR}
        analyzer = Analyzer("peer", network, adapter, output_dir=folder, **options)
        analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=as_batch))
        train, queries = case.draw(case.train, 1), case.draw(case.queries, 2)
        factors = clock.measure(
            lambda: analyzer.fit_all_factors(
                "factors",
                train,
                per_device_batch_size=case.batch,
                factor_args=FactorArguments(strategy="ekfac"),
            )
        )
        scores = clock.measure(
            lambda: analyzer.compute_pairwise_scores(
                "scores",
                "factors",
                query_dataset=queries,
                train_dataset=train,
                per_device_query_batch_size=min(case.batch, case.queries),
                per_device_train_batch_size=case.batch,
                score_args=ScoreArguments(damping_factor=1e-6),
            )
        )
    return {"kronfluence factors": factors, "kronfluence scores": scores}


def measure(name: str, case: Case, device: torch.device, clock: Clock) -> dict[str, Any]:
    """Measure every stage of one model.

    Returns:
        Its figures, with plain epochs beside seconds.
    """
    epochs = 3
    fit(case, device, 1, [])  # kernels are chosen and memory is taken
    stages = {"plain fit": clock.measure(lambda: fit(case, device, epochs, []))}
    stages["fit with the callback"] = clock.measure(lambda: fit(case, device, epochs, [InfluenceCallback()]))
    module = fit(case, device, 1, []).to(device)
    train, queries = load(case.draw(case.train, 1), case.batch), load(case.draw(case.queries, 2), case.batch)
    asked = InfluenceModule(module)
    common: dict[str, Any] = {"layers": case.layers}
    stages["factors"] = clock.measure(lambda: asked.fit_factors(train, **common))
    stages["ekfac scores"] = clock.measure(lambda: asked.scores(train, queries, method="ekfac", **common))
    stages["aggregated query"] = clock.measure(
        lambda: asked.scores(train, queries, method="ekfac", aggregate="mean", **common)
    )
    stages["self-influence"] = clock.measure(lambda: asked.self_influence(train, method="ekfac", **common))
    stages["auto"] = clock.measure(lambda: asked.scores(train, queries, method="auto", **common))
    if Analyzer is None:
        stages["kronfluence"] = {"left_out": "it is not installed"}
    else:
        stages |= run_kronfluence(case, module, clock, device)
    epoch = stages["plain fit"].get("seconds", float("nan")) / epochs
    for found in stages.values():
        if "seconds" in found:
            found["plain_epochs"] = found["seconds"] / epoch
    together = (stages["fit with the callback"], stages["plain fit"])
    overhead = (
        together[0]["seconds"] / together[1]["seconds"] - 1 if all("seconds" in f for f in together) else None
    )
    parameters = sum(parameter.numel() for parameter in module.parameters())
    sizes = {"parameters": parameters, "train": case.train, "queries": case.queries}
    return {"model": name, **sizes, "plain_epoch_seconds": epoch, "fit_overhead": overhead, "stages": stages}


def main() -> None:
    """Measure the chosen models and print their stages."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=list(CASES))
    parser.add_argument("--tiny", action="store_true", help="sizes that show that the script runs")
    parser.add_argument("--seconds", type=float, default=420.0, help="how long stages may begin")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.models) - set(CASES))
    if unknown:
        parser.error(f"unknown models {unknown}; choose of {', '.join(CASES)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tiny = arguments.tiny or device.type == "cpu"
    if tiny:
        print("Tiny sizes: these figures show that the script runs, and say nothing of what anything costs.")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    clock, results = Clock(device, arguments.seconds), []
    for name in arguments.models:
        result = measure(name, (TINY if tiny else CASES)[name], device, clock)
        results.append(result)
        print(
            f"{name}: {result['parameters']:,} parameters, plain epoch {result['plain_epoch_seconds']:.3g} s"
        )
        for stage, found in result["stages"].items():
            memory = f", {found['peak_mib']:.0f} MiB" if "peak_mib" in found else ""
            told = found.get("left_out") or (
                f"{found['seconds']:.3g} s, {found['plain_epochs']:.3g} plain epochs{memory}"
            )
            print(f"  {stage}: {told}")
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    if arguments.json:
        arguments.json.write_text(json.dumps({"device": where, "tiny": tiny, "models": results}, indent=1))


if __name__ == "__main__":
    main()
