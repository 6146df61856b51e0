"""Finding wrong labels: training dynamics, self-influence and ``suspects`` against confident learning.

``python examples/benchmarks/label_errors.py [--cleanlab PYTHON] [--seeds 3] [--json FILE]``. A share of the
digits' training labels is flipped, either to any other class (symmetric) or to the next one (asymmetric).
One fit gives the dynamics, from which ``suspects`` and its parts rank all examples. Confident learning
(Northcutt, Jiang, Chuang 2021) gets probabilities out of sample, from five more fits of the same model on
four fifths of the data each; it runs under the Python of an environment where cleanlab is installed.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from _digits_models import MLP, DigitsData

from lightning_influence import InfluenceCallback, InfluenceTrainer

SHARES = (0.01, 0.05, 0.1, 0.2)
FOLDS, EPOCHS = 5, 20
CONFIDENT_LEARNING = """
import json, sys
import numpy as np
from cleanlab.filter import find_label_issues
from cleanlab.rank import get_label_quality_scores
data = np.load(sys.argv[1])
labels, probabilities = data["labels"], data["probabilities"]
issues = find_label_issues(labels, probabilities)
scores = {}
for method in ("self_confidence", "normalized_margin"):
    quality = get_label_quality_scores(labels, probabilities, method=method)
    scores[method] = (-quality).tolist()
    scores[f"pruned, {method}"] = (np.where(issues, 2.0, 0.0) - quality).tolist()
print(json.dumps(scores))
"""


def flip(labels: Tensor, share: float, kind: str, seed: int) -> tuple[Tensor, Tensor]:
    """Flip a share of labels.

    Args:
        labels: ``(N,)`` of ten classes.
        share: of the examples.
        kind: ``"symmetric"`` or ``"asymmetric"``.
        seed: of the draws.

    Returns:
        The new labels, and which were flipped, ``(N,)``.
    """
    generator = torch.Generator().manual_seed(seed)
    flipped = torch.zeros(len(labels), dtype=torch.bool)
    flipped[torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]] = True
    shift = torch.randint(1, 10, (len(labels),), generator=generator) if kind == "symmetric" else 1
    return torch.where(flipped, (labels + shift) % 10, labels), flipped


def fit(dataset: Any, seed: int, callback: InfluenceCallback | None = None) -> tuple[InfluenceTrainer, MLP]:
    """Fit the digits' MLP.

    Returns:
        The Trainer and the model.
    """
    torch.manual_seed(seed)
    model = MLP()
    trainer = InfluenceTrainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[] if callback is None else [callback],
    )
    trainer.fit(model, DataLoader(dataset, batch_size=32, shuffle=True))
    return trainer, model


def rank_by_signals(dataset: TensorDataset, seed: int) -> dict[str, NDArray[Any]]:
    """Rank all examples after one fit.

    Returns:
        Scores by the name of the signal, the most suspect highest.
    """
    trainer, model = fit(dataset, seed, InfluenceCallback(dynamics=True))
    found = trainer.suspects(model, DataLoader(dataset, batch_size=256))
    dynamics = trainer.training_dynamics()
    assert found.margin_mean is not None
    return {
        "suspects": found.scores.numpy(),
        "mean loss": found.loss_mean.numpy(),
        "mean margin": -found.margin_mean.numpy(),
        "self-influence": found.self_influence.numpy(),
        "forgotten": dynamics.values("forgotten").numpy(),
        "learned late": dynamics.values("late").numpy(),
        "spread of loss": dynamics.loss_spread.numpy(),
    }


def predict_out_of_sample(dataset: TensorDataset, seed: int) -> NDArray[Any]:
    """Predict every example with a model that was fitted without it.

    Returns:
        Probabilities ``(N, 10)``.
    """
    inputs = dataset.tensors[0]
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
    probabilities = torch.zeros(len(inputs), 10)
    for fold in range(FOLDS):
        held, kept = order[fold::FOLDS], torch.cat([order[i::FOLDS] for i in range(FOLDS) if i != fold])
        _, model = fit(Subset(dataset, kept.tolist()), seed)
        with torch.no_grad():
            probabilities[held] = model.eval()(inputs[held]).softmax(-1)
    return probabilities.numpy()


def learn_confidently(labels: Tensor, probabilities: NDArray[Any], python: str) -> dict[str, NDArray[Any]]:
    """Rank all examples with cleanlab.

    Returns:
        Scores by the name of the method, the most suspect highest.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "predictions.npz"
        np.savez(path, labels=labels.numpy(), probabilities=probabilities)
        done = subprocess.run(
            [python, "-c", CONFIDENT_LEARNING, str(path)], check=True, capture_output=True, text=True
        )
    return {f"cleanlab, {name}": np.array(v) for name, v in json.loads(done.stdout.splitlines()[-1]).items()}


def judge(scores: NDArray[Any], flipped: NDArray[Any]) -> dict[str, float]:
    """Compare a ranking with the truth.

    Returns:
        AUROC, average precision, and the share of the flips among as many examples as there are flips.
    """
    first = np.argsort(-scores, kind="stable")[: int(flipped.sum())]
    return {
        "auroc": float(roc_auc_score(flipped, scores)),
        "precision": float(average_precision_score(flipped, scores)),
        "found": float(flipped[first].mean()),
    }


def run(share: float, kind: str, seed: int, python: str | None) -> list[dict[str, Any]]:
    """Judge every ranking in one case.

    Returns:
        A record for each ranking.
    """
    inputs, labels = DigitsData().train_set.tensors
    noisy, flipped = flip(labels, share, kind, seed)
    dataset = TensorDataset(inputs, noisy)
    rankings = rank_by_signals(dataset, seed)
    if python is not None:
        rankings |= learn_confidently(noisy, predict_out_of_sample(dataset, seed), python)
    return [
        {"share": share, "kind": kind, "seed": seed, "ranking": name, **judge(scores, flipped.numpy())}
        for name, scores in rankings.items()
    ]


def render(records: list[dict[str, Any]], measure: str, console: Console) -> None:
    """Print means over seeds: a row for each ranking, a column for each case."""
    cases = list(dict.fromkeys((record["kind"], record["share"]) for record in records))
    table = Table(title=f"Flipped labels of digits: {measure}, mean over seeds")
    table.add_column("ranking")
    for kind, share in cases:
        table.add_column(f"{kind[:4]} {share:.0%}", justify="right")
    for name in dict.fromkeys(record["ranking"] for record in records):
        cells = []
        for kind, share in cases:
            values = [
                record[measure]
                for record in records
                if (record["kind"], record["share"], record["ranking"]) == (kind, share, name)
            ]
            cells.append(f"{np.mean(values):.4f}")
        table.add_row(name, *cells)
    console.print(table)


def main() -> None:
    """Run all cases and print a table for each measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cleanlab", metavar="PYTHON", help="an interpreter with cleanlab; left out without")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where to write every figure")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    records = []
    for kind in ("symmetric", "asymmetric"):
        for share in SHARES:
            for seed in range(arguments.seeds):
                records += run(share, kind, seed, arguments.cleanlab)
                if arguments.json:
                    arguments.json.write_text(json.dumps(records, indent=1))
    console = Console(width=120)
    for measure in ("auroc", "precision", "found"):
        render(records, measure, console)


if __name__ == "__main__":
    main()
