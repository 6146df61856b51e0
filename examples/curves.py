"""The curves that the callback logs during a fit, drawn from a CSV log as any other metric is.

Trains the MLP of ``digits.py`` and draws what ``InfluenceCallback`` logged under ``influence/``.

    python examples/curves.py [--output docs/images/curves.png] [--epochs 40]
"""

from __future__ import annotations

import csv
import tempfile
from pathlib import Path

from _digits_models import MLP, DigitsData
from _drawing import read_options
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from matplotlib.figure import Figure

from lightning_influence import InfluenceCallback

DEFAULT = Path(__file__).parents[1] / "docs" / "images" / "curves.png"
OVERHEAD = 0.5  # ten times the default: this run is so short that few batches would be collected
# Names under ``influence/``, and whether the axis is logarithmic.
CURVES = {
    "grad_norm": True,
    "noise_scale": True,
    "trace": True,
    "top_eigenvalue": True,
    "stable_rank": False,
    "effective_learning_rate": False,
}


def train(folder: Path, epochs: int) -> Path:
    """Train with a CSV logger.

    Args:
        folder: of the logs.
        epochs: of the training.

    Returns:
        The file of metrics.
    """
    seed_everything(0, verbose=False)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[InfluenceCallback(overhead=OVERHEAD)],
        logger=CSVLogger(folder),
        log_every_n_steps=10,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(MLP(), datamodule=DigitsData())
    return Path(str(trainer.log_dir)) / "metrics.csv"


def draw(metrics: Path) -> Figure:
    """Draw the curves.

    Args:
        metrics: a file of Lightning's CSV logger.

    Returns:
        A figure with one panel a curve; a curve that was not logged has an empty one.
    """
    with metrics.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    for axes, (name, is_logarithmic) in zip(figure.subplots(2, 3).flat, CURVES.items(), strict=True):
        points = [(int(row["step"]), float(row[key])) for row in rows if row.get(key := f"influence/{name}")]
        axes.plot([step for step, _ in points], [value for _, value in points], ".-", color="tab:blue")
        axes.set_title(f"influence/{name}", fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        if is_logarithmic and points:
            axes.set_yscale("log")
    return figure


def main(arguments: list[str] | None = None) -> None:
    """Draw the picture."""
    options = read_options(__doc__, DEFAULT, arguments)
    with tempfile.TemporaryDirectory() as folder:
        figure = draw(train(Path(folder), options.epochs))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.output, dpi=90)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
