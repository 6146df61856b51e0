"""Many runs in parallel processes, with what is finished kept."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from lightning_influence.evaluation.harness.retraining import Retraining
from lightning_influence.evaluation.harness.run import Runs, seed_all
from lightning_influence.evaluation.harness.store import RunStore, fingerprint
from lightning_influence.support.arguments import check_masks, read_seeds
from lightning_influence.support.errors import InfluenceError
from lightning_influence.support.random_states import preserve_rng

Run = tuple[Tensor, int]
_runs: Runs | None = None
_store: RunStore | None = None


def retrain_subsets(
    retraining: Retraining,
    masks: Tensor,
    seeds: Sequence[int] | Tensor,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    processes: int | None = None,
    data_key: str | None = None,
    progress: bool | Callable[[int, int], None] = True,
) -> Tensor:
    """Values of the queries under models retrained on subsets, every subset with every seed.

    Every run has a fresh module and a fresh Trainer. Its initial values follow the seed alone, so that runs
    of one seed start from the same point whatever their subset. A run is written to ``cache_dir`` by the
    process that finished it: a computation that was interrupted, or whose worker was killed, goes on where it
    stopped when it is called again. A run is found again while the functions and all of the user's code they
    name, the values of globals, defaults, closures and objects among it, the data, the subset, the seed and
    the versions of torch, Lightning, NumPy and this library are the same.

    Args:
        retraining: the factories, importable by name; see :class:`Retraining`.
        masks: kept examples of each subset, boolean, ``(M, N)``.
        seeds: ``S`` different seeds, a sequence, a tensor or an array.
        cache_dir: where finished runs are kept; nothing is kept without it.
        processes: worker processes, each with one torch thread; as many as CPUs if None, 0 for this process.
        data_key: a string that stands for the content of the data, for data that are too large to be hashed.
        progress: True for a progress bar, or a function called with the numbers of finished and of all runs.

    Returns:
        Measured values, ``(M, S, Q)``, float64.

    Raises:
        InfluenceError: if a worker process died, or the factories do not give fresh objects.
        ValueError: if arguments do not fit together, or a function cannot be imported by a worker.
        TypeError: if runs are kept, and the functions or the data are made of what cannot be hashed.
    """
    chosen, count = read_seeds(seeds), _cpus() if processes is None else processes
    size, mark = _prepare(retraining, data_key, wanted=cache_dir is not None, parallel=count > 0)
    _check(masks, size, count)
    store = None if cache_dir is None else RunStore(Path(cache_dir) / mark)
    runs = [(mask, seed) for mask in masks.cpu() for seed in chosen]
    found: dict[tuple[bytes, int], Tensor] = {}
    missing: dict[tuple[bytes, int], Run] = {}
    for run in runs:
        values = None if store is None or _key(run) in found else store.load(*run)
        if values is not None:
            found[_key(run)] = values
        elif _key(run) not in found:
            missing[_key(run)] = run
    with _Reporter(progress, len(found) + len(missing)) as report:
        report(len(found))
        for run, values in _execute(retraining, list(missing.values()), store, count):
            found[_key(run)] = values
            report(len(found))
    return torch.stack([found[_key(run)] for run in runs]).view(len(masks), len(chosen), -1)


def _cpus() -> int:
    """Return how many CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _prepare(
    retraining: Retraining, data_key: str | None, *, wanted: bool, parallel: bool
) -> tuple[int, str]:
    """Check the factories.

    Returns:
        The number of training examples and, if wanted, the fingerprint.

    Raises:
        ValueError: if a function cannot be imported, or the data have no length.
    """
    if parallel:
        retraining.check_importable()
    with preserve_rng():
        retraining.check_fresh()
        # As in a worker: random augmentations are hashed at the values that this seed gives.
        seed_all(0, "data")
        data, queries = retraining.data(), retraining.queries()
        if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
            raise ValueError(
                f"`data()` returned a {type(data).__name__} without length or indices; accepted is a "
                "map-style Dataset, whose examples can be left out one by one."
            )
        size = len(data)
        return size, fingerprint(retraining, data, queries, data_key) if wanted else ""


def _execute(
    retraining: Retraining, runs: list[Run], store: RunStore | None, processes: int
) -> Generator[tuple[Run, Tensor], None, None]:
    """Yield every run with its values as it finishes."""
    if not runs:
        return
    if processes == 0:
        local = Runs(retraining)
        for run in runs:
            yield run, _finish(local, store, *run)
        return
    with closing(_in_processes(retraining, runs, store, min(processes, len(runs)))) as results:
        yield from results


def _in_processes(
    retraining: Retraining, runs: list[Run], store: RunStore | None, processes: int
) -> Generator[tuple[Run, Tensor], None, None]:
    """The runs in spawned workers.

    Yields:
        A run with its values, in the order in which runs finish.

    Raises:
        InfluenceError: if a worker died.
    """
    pool = ProcessPoolExecutor(
        processes,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_initialise,
        initargs=(retraining, None if store is None else str(store.folder)),
    )
    finished = 0
    try:
        # Lists and not tensors: a tensor would travel through shared memory.
        waiting: dict[Future[list[float]], Run] = {
            pool.submit(_work, kept.tolist(), seed): (kept, seed) for kept, seed in runs
        }
        while waiting:
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                run = waiting.pop(future)
                values = torch.tensor(future.result(), dtype=torch.float64)
                finished += 1
                yield run, values
    except BrokenProcessPool as error:
        kept = f"; {finished} runs of this call are kept in {store.folder}" if store is not None else ""
        raise InfluenceError(
            f"A worker process died (killed, or out of memory){kept}. Call again to go on, with fewer "
            "`processes` if memory was short. If it died at once, the script that calls this lacks "
            '`if __name__ == "__main__":`.'
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _initialise(retraining: Retraining, folder: str | None) -> None:
    """Prepare a worker process."""
    global _runs, _store
    torch.set_num_threads(1)
    # Every Trainer announces itself; a hundred of them hide the progress bar.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    _runs, _store = Runs(retraining), None if folder is None else RunStore(Path(folder))


def _work(kept: list[bool], seed: int) -> list[float]:
    """Return the values of one run, in a worker process."""
    assert _runs is not None
    values: list[float] = _finish(_runs, _store, torch.tensor(kept), seed).tolist()
    return values


def _finish(runs: Runs, store: RunStore | None, kept: Tensor, seed: int) -> Tensor:
    values = runs(kept, seed)
    if store is not None:
        store.save(kept, seed, values)
    return values


def _key(run: Run) -> tuple[bytes, int]:
    return run[0].numpy().tobytes(), run[1]


def _check(masks: Tensor, size: int, processes: int) -> None:
    check_masks(masks, size)
    if processes < 0:
        raise ValueError(f"processes must be at least 0, got {processes}.")


class _Reporter:
    """A progress bar, the caller's function, or silence."""

    def __init__(self, progress: bool | Callable[[int, int], None], total: int) -> None:
        self._call = None if isinstance(progress, bool) else progress
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, disable=progress is not True)
        self._task, self._total = self._bar.add_task("Retraining", total=total), total

    def __enter__(self) -> Callable[[int], None]:
        self._bar.start()
        return self._report

    def __exit__(self, *details: object) -> None:
        self._bar.stop()

    def _report(self, done: int) -> None:
        self._bar.update(self._task, completed=done)
        if self._call is not None:
            self._call(done, self._total)
