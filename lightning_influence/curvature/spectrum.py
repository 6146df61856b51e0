"""The spectrum of a curvature in a few passes: traces, extreme eigenvalues, ranks and density."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from rich.console import Group, RenderableType
from torch import Tensor

from lightning_influence.linalg.estimates import Estimate, Product, add_traces_outside, divide, draw_vectors
from lightning_influence.linalg.lanczos import Ritz, block_lanczos
from lightning_influence.results.rendering import build_facts_table
from lightning_influence.support.arguments import check_count

_SHOWN = 8


@dataclass(frozen=True, repr=False)
class Spectrum:
    """The spectrum of the curvature of the average per-example training loss, without damping.

    Attributes:
        curvature: ``"ggn"`` or ``"hessian"``.
        numel: ``P``: number of eigenvalues.
        trace: sum of the eigenvalues, with its standard error.
        square_trace: sum of their squares, with its standard error.
        eigenvalues: the largest, largest first; each with a bound within which some eigenvalue lies.
        smallest: the smallest, with such a bound.
        stable_rank: trace over the largest eigenvalue; the stable rank of the Jacobian whose Gram matrix a
            Gauss-Newton matrix is. It means little for an indefinite Hessian.
        numerical_rank: sum of squares over the largest square (Rudelson and Vershynin 2007).
        example_variance: ``kappa``, how much single examples vary, at least; None if it was not asked for.
        passes: passes over all the data that this took.
        ritz: Ritz values and vectors, for the density and further eigenvalues.
    """

    curvature: str
    numel: int
    trace: Estimate
    square_trace: Estimate
    eigenvalues: list[Estimate]
    smallest: Estimate
    stable_rank: Estimate
    numerical_rank: Estimate
    passes: int
    ritz: Ritz = field(repr=False)
    example_variance: Estimate | None = None

    @property
    def share_negative(self) -> Estimate:
        """Share of the eigenvalues that are negative beyond rounding, with its standard error.

        It comes from a quadrature with few points: eigenvalues near zero count roughly.
        """
        return self.ritz.share_below(-1e-6 * float(self.ritz.values.abs().max()))

    def density(self, count: int = 200, width: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Spectral density, smoothed.

        Args:
            count: number of points.
            width: standard deviation of the Gaussian that smooths; a fiftieth of the spectrum's range if
                None.

        Returns:
            Points between the smallest and the largest eigenvalue with a margin, the density there (it
            integrates to 1), and its standard error, each ``(count,)``.

        Raises:
            ValueError: if the width is not positive.
        """
        low, high = float(self.ritz.values[0]), float(self.ritz.values[-1])
        spread = max(high - low, abs(high), torch.finfo(torch.float64).tiny)
        width = spread / 50 if width is None else width
        if not width > 0:
            raise ValueError(f"Got width={width}; accepted are positive numbers.")
        points = torch.linspace(low - 3 * width, high + 3 * width, count, dtype=torch.float64)
        return (points, *self.ritz.density(points, width))

    def facts(self) -> list[tuple[str, str]]:
        """Return names and values for a table."""
        found = [
            ("eigenvalues", f"{self.numel:,}"),
            ("trace", str(self.trace)),
            ("trace of the square", str(self.square_trace)),
            *((f"eigenvalue {i}", str(value)) for i, value in enumerate(self.eigenvalues[:_SHOWN], start=1)),
            ("smallest eigenvalue", str(self.smallest)),
            ("stable rank (trace / largest)", str(self.stable_rank)),
            ("numerical rank (squares / largest square)", str(self.numerical_rank)),
        ]
        if self.example_variance is not None:
            found.append(("variance of examples (kappa, at least)", str(self.example_variance)))
        return [*found, ("passes over the data", str(self.passes))]

    def __rich__(self) -> RenderableType:
        note = "Errors: standard errors of traces and ranks; for eigenvalues a bound within which one lies."
        return Group(
            build_facts_table(self.facts(), f"Spectrum of the {_NAMES.get(self.curvature, 'matrix')}"), note
        )

    def __repr__(self) -> str:
        return f"Spectrum({self.curvature!r}, trace={self.trace}, largest={self.eigenvalues[0]})"


_NAMES = {"ggn": "Gauss-Newton matrix", "hessian": "Hessian"}


def measure_spectrum(
    product: Product,
    numel: int,
    *,
    probes: int = 8,
    steps: int = 8,
    eigenvalues: int = 8,
    seed: int = 0,
    curvature: str = "ggn",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Spectrum:
    """Measure a spectrum with ``steps + 1`` calls of the product on ``probes`` vectors each.

    One block Krylov space serves for everything: its Ritz values are the leading eigenvalues and the density,
    and the traces are exact within it and estimated outside of it from fresh random vectors, as in Hutch++
    (Meyer et al. 2021).

    Args:
        product: ``H``.
        numel: ``P``.
        probes: random vectors in a block, at least 2 for standard errors.
        steps: products of the Krylov space.
        eigenvalues: how many of the largest to report.
        seed: of the random vectors.
        curvature: what it is the spectrum of.
        dtype: precision of the vectors.
        device: where they are.

    Returns:
        The spectrum.

    Raises:
        ValueError: if a number is out of range.
    """
    least = {"probes": (probes, 2), "steps": (steps, 1), "eigenvalues": (eigenvalues, 1)}
    for name, (value, lowest) in least.items():
        check_count(name, value, lowest)
    passes = 0

    def counted(vectors: Tensor) -> Tensor:
        nonlocal passes
        passes += 1
        return product(vectors)

    start = draw_vectors(probes, numel, 2 * seed, kind="normal", dtype=dtype, device=device)
    ritz = block_lanczos(counted, start, steps)
    traces = ritz.inside
    if len(ritz.basis) < numel:
        fresh = draw_vectors(probes, numel, 2 * seed + 1, dtype=dtype, device=device)
        traces = add_traces_outside(counted, ritz.basis, traces, fresh)
    norm = ritz.norm()
    squared = Estimate(norm.value**2, None if norm.error is None else 2 * norm.value * norm.error)
    return Spectrum(
        curvature=curvature,
        numel=numel,
        trace=traces.trace,
        square_trace=traces.square,
        eigenvalues=ritz.top(eigenvalues),
        smallest=ritz.bottom(),
        stable_rank=divide(traces.trace, norm),
        numerical_rank=divide(traces.square, squared),
        passes=passes,
        ritz=ritz,
    )
