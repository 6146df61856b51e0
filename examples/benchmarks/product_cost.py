"""Gauss-Newton products through second derivatives, by number of vectors, in plain epochs of a model.

``OMP_NUM_THREADS=1 python examples/benchmarks/product_cost.py [gpt] [--examples 64]`` takes a model of
``large_models.py`` with random weights. A row is one pass over all examples; the better of two in CPU time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from large_auto import time_epoch
from large_models import SIZES, train

from lightning_influence.curvature.gauss_newton import CurvatureProductPass
from lightning_influence.model.layers.plan import find_layers


def main(arguments: Sequence[str] | None = None) -> dict[int, float]:
    """Return, and print, the plain epochs of a product by number of vectors."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="gpt", choices=list(SIZES))
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--vectors", type=int, nargs="+", default=[1, 2, 4, 8])
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    module, (loader, _), _ = train(replace(SIZES[given.model], examples=given.examples), epochs=0)
    plan, plain = find_layers(module), time_epoch(module, loader)
    found = {}
    for count in given.vectors:
        vectors, seconds = torch.randn(count, plan.numel), []
        for _ in range(2):
            product, started, start = (
                CurvatureProductPass(plan, vectors, fisher="exact"),
                time.process_time(),
                0,
            )
            for batch in loader:
                indices = torch.arange(start, start := start + len(batch[0]))
                product.step(module, batch, indices, 0)
            seconds.append(time.process_time() - started)
        found[count] = min(seconds) / plain
        print(f"{count} vectors: {found[count]:.1f} plain epochs", flush=True)
    return found


if __name__ == "__main__":
    main()
