"""Many runs in parallel processes that end with the caller's, and keep what they finish."""

from __future__ import annotations

import logging
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from lightning_influence.evaluation.harness.retraining import Retraining
from lightning_influence.evaluation.harness.run import Runs, seed_all
from lightning_influence.evaluation.harness.store import RunStore, find_folder
from lightning_influence.support.arguments import check_count, check_masks, read_seeds
from lightning_influence.support.errors import InfluenceError
from lightning_influence.support.random_states import preserve_rng

Run = tuple[Tensor, int]
# How often a worker asks for its parent's id. Chosen by hand: a wake-up a second costs no measurable time,
# and an orphan that trains on for a second harms nobody.
_WATCH_SECONDS = 1.0
_runs: Runs | None = None
_store: RunStore | None = None


def retrain_subsets(
    retraining: Retraining,
    masks: Tensor,
    seeds: Sequence[int] | Tensor,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    cache_key: str | None = None,
    processes: int | None = None,
    progress: bool | Callable[[int, int], None] = True,
) -> Tensor:
    """Retrain on subsets, every subset with every seed, and measure the queries under each model.

    Every run has a fresh module and a fresh Trainer. Its initial values follow the seed alone, so that runs
    of one seed start from the same point whatever their subset. A run is written to ``cache_dir`` by the
    process that finished it: a computation that was interrupted, or whose worker was killed, goes on where it
    stopped when it is called again. Workers end with the process that called, however it dies.

    A kept run is found again under the same ``cache_key``, name of the measurement, subset, seed, and
    versions of torch, Lightning, NumPy and this library. What the factories do is not looked at: the key has
    to change with the module, the Trainer, the data, the loader, the queries and the measurement.

    Args:
        retraining: the factories, importable by name; see :class:`Retraining`.
        masks: kept examples of each subset, boolean, ``(M, N)``.
        seeds: ``S`` different seeds, a sequence, a tensor or an array.
        cache_dir: where finished runs are kept; nothing is kept without it.
        cache_key: a text that stands for everything that decides a run but its subset and seed, such as
            ``"digits v2, mlp 64, lr 0.1, 20 epochs"``; required with ``cache_dir``.
        processes: worker processes, each with one torch thread; as many as CPUs if None, 0 for this process.
        progress: True for a progress bar, or a function called with the numbers of finished and of all runs.

    Returns:
        Measured values, ``(M, S, Q)``, float64.

    Raises:
        InfluenceError: if a worker process died, or the factories do not give fresh objects.
        CorruptFileError: if the file of a kept run is damaged.
        ValueError: if arguments do not fit together, a function cannot be imported by a worker, or kept runs
            have other queries.
    """
    chosen, count = read_seeds(seeds), _count_cpus() if processes is None else processes
    store = _open_store(retraining, cache_dir, cache_key)
    check_masks(masks, _prepare(retraining, parallel=count > 0))
    check_count("processes", count, 0)
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
    measured = [found[_key(run)] for run in runs]
    sizes = {len(values) for values in measured}
    if len(sizes) > 1:
        raise ValueError(
            f"Runs under cache_key={cache_key!r} measured {sorted(sizes)} queries. Choose another cache_key "
            "whenever the queries, or anything else of a run, change."
        )
    return torch.stack(measured).view(len(masks), len(chosen), -1)


def _open_store(
    retraining: Retraining, cache_dir: str | os.PathLike[str] | None, cache_key: str | None
) -> RunStore | None:
    """Open the folder that runs are kept in, if they are.

    Returns:
        The store, or None.

    Raises:
        ValueError: if there is a folder without a key, or a key without a folder.
    """
    if cache_dir is None and cache_key is None:
        return None
    if cache_dir is None:
        raise ValueError(f"Got cache_key={cache_key!r} without cache_dir: pass the folder to keep runs in.")
    if not isinstance(cache_key, str) or not cache_key.strip():
        raise ValueError(
            f"Got cache_key={cache_key!r} with a cache_dir; accepted is a text that names all that decides a "
            "run besides its subset and seed: module, trainer, data, loader, queries and measurement with "
            'their settings, such as "digits v2, mlp 64, lr 0.1, 20 epochs". Change it whenever one changes.'
        )
    name = retraining.measurement if isinstance(retraining.measurement, str) else None
    return RunStore(find_folder(cache_dir, cache_key, name), cache_key)


def _count_cpus() -> int:
    """Return how many CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _prepare(retraining: Retraining, *, parallel: bool) -> int:
    """Check the factories.

    Returns:
        ``N``, the number of training examples.

    Raises:
        ValueError: if a function cannot be imported, or the data have no length.
    """
    if parallel:
        retraining.check_importable()
    with preserve_rng():
        retraining.check_fresh()
        seed_all(0, "data")  # as in a worker
        data = retraining.data()
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        raise ValueError(
            f"`data()` returned a {type(data).__name__} without length or indices; accepted is a map-style "
            "Dataset, whose examples can be left out one by one."
        )
    return len(data)


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
        initargs=(retraining, store),
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


def _initialise(retraining: Retraining, store: RunStore | None) -> None:
    """Prepare a worker process."""
    global _runs, _store
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    # Every Trainer announces itself; a hundred of them hide the progress bar.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    _runs, _store = Runs(retraining), store


def _end_with_parent() -> None:
    """Wait for the death of the process that started this worker, and end this one.

    A killed parent cannot tell its workers, and they would go on with the queued runs, then wait for more for
    ever. The sentinel is a pipe (on Windows a handle) that the operating system closes with the parent; a
    process that the parent forked holds the pipe open, so the parent's id is looked at too.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    while not multiprocessing.connection.wait([parent.sentinel], timeout=_WATCH_SECONDS):
        if os.name == "posix" and os.getppid() != parent.pid:
            break
    # Not sys.exit, which would end this thread alone. Finished runs are on disk, and files are replaced as a
    # whole, so that nothing is lost that could have been finished.
    os._exit(1)


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


class _Reporter:
    """A progress bar, the caller's function, or silence."""

    def __init__(self, progress: bool | Callable[[int, int], None], total: int) -> None:
        self._call = None if isinstance(progress, bool) else progress
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, disable=progress is not True)
        self._task, self._total = self._bar.add_task("Retraining", total=total), total

    def __enter__(self) -> Callable[[int], None]:
        if not self._bar.disable:  # rich 13 prints a line all the same
            self._bar.start()
        return self._report

    def __exit__(self, *details: object) -> None:
        if not self._bar.disable:
            self._bar.stop()

    def _report(self, done: int) -> None:
        self._bar.update(self._task, completed=done)
        if self._call is not None:
            self._call(done, self._total)
