"""What the callback costs a fit is measured by fits without it, and in its hooks."""

import io
from dataclasses import replace

import lightning
import pytest
import torch
from benchmarks import load_benchmark
from rich.console import Console

pytestmark = pytest.mark.slow


def test_a_task_gives_a_row():
    benchmark = load_benchmark("overhead")
    task = benchmark.TASKS["digits_mlp"]()
    task = replace(task, train=task.train.head(96), recipe=replace(task.recipe, epochs=2))
    result = benchmark.overhead(task, 2)
    assert result.steps == task.recipe.steps(96)
    assert len(result.plain) == len(result.collecting) == len(result.hooks) == 2
    assert result.batches >= 1
    assert all(0 < share < 10 for share in result.hooks)
    assert all(part > 0 for part in result.dynamics)
    written = io.StringIO()
    benchmark.render([result], Console(file=written, width=120))
    assert "digits_mlp" in written.getvalue()


class Burning(lightning.Callback):
    def on_train_start(self, trainer, pl_module):
        for _ in range(50):
            torch.ones(200, 200) @ torch.ones(200, 200)
        raise KeyError(trainer)


def test_a_clock_counts_what_hooks_take_also_where_they_fail():
    callback = Burning()
    clock = load_benchmark("hook_clock").HookClock(callback)
    callback.on_fit_end(None, None)
    before = clock.seconds
    with pytest.raises(KeyError, match="trainer"):
        callback.on_train_start("trainer", None)
    assert clock.seconds > before
    assert clock.share(3 * clock.seconds) == pytest.approx(0.5)
