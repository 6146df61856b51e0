"""Results to test with: scores, ends of rankings, self-influence and diagnostics."""

import torch

from lightning_influence.results.attributions import Attributions
from lightning_influence.results.diagnostics import Diagnostics
from lightning_influence.results.self_influence import SelfInfluence
from lightning_influence.results.top_k import StreamingExtremes

Q, N, K = 3, 8, 3
TRAIN = torch.tensor([50, 20, 31, 7, 40, 11, 99, 60])
QUERIES = torch.tensor([5, 2, 9])


def diagnostics(**changes):
    values = {
        "method": "ekfac",
        "damping": {"0": 1e-3, "2": 2e-3},
        "damping_origin": "from the training run",
        "residuals": torch.tensor([0.1, 0.2, 0.3]),
        "passes": [{"name": "query", "seconds": 0.5, "examples": 3, "batches": 1}],
        "seconds": 1.5,
        "layers": {"0": 100, "2": 20},
        "parameters_covered": 0.75,
        "warnings": ["layer [norm] left out"],
        "extra": {"rank": 16, "basis": torch.eye(2)},
    }
    return Diagnostics(**{**values, **changes})


def full(**changes):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(Q, N, generator=generator, dtype=torch.float64)
    values = {
        "scores": scores,
        "train_indices": TRAIN,
        "query_indices": QUERIES,
        "diagnostics": diagnostics(),
    }
    return Attributions(**{**values, **changes})


def ends(k=K, **changes):
    stream = StreamingExtremes(Q, k)
    stream.update(full().scores, TRAIN)
    others = {"query_indices": QUERIES, "diagnostics": diagnostics(), **changes}
    return Attributions.from_extremes(stream.result(), **others)


def self_influence(**changes):
    scores = torch.tensor([0.5, 0.1, 0.9, 0.3, 0.2, 0.8, 0.7, 0.4])
    return SelfInfluence(**{
        "scores": scores,
        "train_indices": TRAIN,
        "diagnostics": diagnostics(),
        **changes,
    })
