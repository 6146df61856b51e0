"""Dynamics that fail stop with one warning: the fit, and the factors of it, are as without them."""

import warnings

import pytest
import torch
from callback_models import Classifier, fit, loader, same
from lightning.pytorch.callbacks import ModelCheckpoint
from two_processes import check_script

from lightning_influence.collecting.callback import InfluenceCallback
from lightning_influence.collecting.moments import Moments
from lightning_influence.collecting.watching import Watching
from lightning_influence.model.live.example_losses import LossWatch
from lightning_influence.running.host.indices import IndexWatch
from lightning_influence.support.errors import InfluenceWarning

ENTRIES = [
    *((Watching, name) for name in vars(Watching) if name[0] != "_" and name not in ("is_shared", "fail")),
    *((Moments, name) for name in ("add", "fold", "state_dict")),
    *((LossWatch, name) for name in ("read_held", "open", "close", "take", "take_met")),
    *((IndexWatch, name) for name in ("open", "close", "read")),
]  # fmt: skip
# What is raised there makes single batches missed, as ever.
MISSED = {(LossWatch, "take"), (LossWatch, "read_held"), (IndexWatch, "read")}


class Plain(Classifier):
    def on_fit_end(self):
        self.draws = torch.get_rng_state()


def run(tmp_path, name, *callbacks):
    saves = ModelCheckpoint(tmp_path / name, every_n_train_steps=7, save_top_k=-1)
    module = Plain()
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        host = fit(module, saves, *callbacks)
    said = [str(w.message) for w in record if issubclass(w.category, InfluenceWarning)]
    return module, host, said


def test_every_entry_is_among_the_faults():
    names = {name for owner, name in ENTRIES if owner is Watching}
    assert names >= {
        "begin_epoch", "end_epoch", "begin_batch", "take", "end_batch", "leave_batch", "flush", "close",
        "tell", "sum_over_processes",
    }  # fmt: skip


@pytest.mark.grid
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(("owner", "name"), ENTRIES)
def test_a_failure_in_dynamics_ends_neither_fit_nor_collecting(monkeypatch, tmp_path, owner, name, strict):
    if strict and (owner, name) in MISSED:
        pytest.skip("one batch is missed, and nothing stops")
    plain, other, _ = run(tmp_path, "plain")
    reference = InfluenceCallback(every_n_steps=1, dynamics=False)
    run(tmp_path, "factors", reference)
    callback = InfluenceCallback(every_n_steps=1, dynamics=True, strict=strict)
    real, failing = getattr(owner, name), [True]

    def fail(*args, **kwargs):
        if failing:
            raise MemoryError("no room\nfor details")
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, fail)
    if strict:
        with pytest.raises(MemoryError, match="no room"):
            run(tmp_path, "strict", callback)
        return
    module, host, said = run(tmp_path, "watched", callback)
    failing.clear()
    assert torch.equal(module.draws, plain.draws)
    assert same(dict(module.state_dict()), dict(plain.state_dict()))
    assert same(host.optimizers[0].state_dict(), other.optimizers[0].state_dict())
    assert torch.overrides._len_torch_function_stack() == 0
    assert callback.num_collected == reference.num_collected == 20
    assert same(callback.factors.state_dict(), reference.factors.state_dict())
    assert len(said) == 1, said
    assert "MemoryError: no room" in said[0] or (owner, name) in MISSED
    if (owner, name) not in MISSED:
        assert said[0].startswith("Training dynamics are not kept during this fit: MemoryError: no room.")
        assert callback.dynamics.epochs == callback.dynamics.missed == 0
        assert callback.dynamics.notes == ["MemoryError: no room."]
    saved = sorted((tmp_path / "watched").glob("*.ckpt"))
    assert saved
    for path in saved:
        again = InfluenceCallback()
        again.load_state_dict(torch.load(path, weights_only=True)["callbacks"]["InfluenceCallback"])
        assert again.num_collected > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_moments_do_not_go_by_the_default_dtype(tmp_path, dtype):
    reference = InfluenceCallback(every_n_steps=1, dynamics=True)
    run(tmp_path, "reference", reference)
    callback = InfluenceCallback(every_n_steps=1, dynamics=True)
    data, module = loader(), Classifier()
    torch.set_default_dtype(dtype)
    try:
        fit(module, callback, data=data)
    finally:
        torch.set_default_dtype(torch.float32)
    assert callback.dynamics.epochs == 4
    assert callback.dynamics.floats.dtype == torch.float32
    other = InfluenceCallback()
    other.load_state_dict(callback.state_dict())
    assert other.dynamics.epochs == 4
    if dtype == torch.float64:  # whose random numbers for dropout are the same
        assert same(callback.dynamics.counts, reference.dynamics.counts)


class Skips(Classifier):
    """Leaves out the rest of each epoch after two batches, and looks who watches then."""

    def __init__(self):
        super().__init__()
        self.modes = []

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == 2 else None

    def on_train_epoch_end(self):
        self.modes.append(torch.overrides._len_torch_function_stack())


class SkipsWithOwnLoss(Skips):
    def influence_loss(self, batch):
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1], reduction="none")


class SkipsAtOnce(SkipsWithOwnLoss):
    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == 0 else None


@pytest.mark.grid
@pytest.mark.parametrize("make", [Skips, SkipsWithOwnLoss, SkipsAtOnce])
@pytest.mark.parametrize(
    "options", [{}, {"every_n_steps": 1}, {"dynamics": False, "every_n_steps": 1}, {"dynamics": True}]
)
def test_skipping_the_rest_of_an_epoch_leaves_nothing_on(make, options):
    module, plain, callback = make(), make(), InfluenceCallback(**options)
    fit(module, callback)
    fit(plain)
    assert same(dict(module.state_dict()), dict(plain.state_dict()))
    assert module.modes == [0] * 4
    assert torch.overrides._len_torch_function_stack() == 0
    assert all(not part._forward_hooks for part in module.modules())
    torch.compiler.reset()
    assert torch.compile(torch.nn.Linear(5, 3), backend="eager")(torch.randn(2, 5)).shape == (2, 3)
    if options.get("dynamics") and make is not SkipsAtOnce:
        assert callback.dynamics.batches == 8
        assert callback.dynamics.missed == 0


SCRIPT = """
import sys, warnings
import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from lightning_influence import InfluenceCallback
from lightning_influence.collecting import watching
from lightning_influence.collecting.moments import Moments

torch.set_num_threads(1)


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(4, 3)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.body(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


torch.manual_seed(0)
train = DataLoader(TensorDataset(torch.randn(32, 4), torch.arange(32) % 3), batch_size=4, shuffle=True)


def fit(module, name, *callbacks):
    saves = ModelCheckpoint(f"{sys.argv[1]}/{name}", every_n_train_steps=5, save_top_k=-1)
    trainer = pl.Trainer(
        max_epochs=4, accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[saves, *callbacks],
    )
    torch.manual_seed(1)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        trainer.fit(module, train)
    return trainer, [str(w.message) for w in record if "raining dynamics" in str(w.message)]


def failing_on_one(owner, name, after):
    real, calls = getattr(owner, name), []

    def fail(self, *args, **kwargs):
        calls.append(0)
        if torch.distributed.get_rank() == 1 and len(calls) > after:
            raise MemoryError("no room")
        return real(self, *args, **kwargs)

    setattr(owner, name, fail)
    return lambda: setattr(owner, name, real)


plain = Net()
fit(plain, "plain")
for owner, name in (
    (Moments, "add"), (Moments, "fold"), (watching.Watching, "begin_batch"), (watching.Watching, "flush"),
    (watching.Watching, "end_batch"), (watching.Watching, "_compare_values"), (watching, "start_watching"),
):
    for after in (0, 2):
        if owner is watching:
            from lightning_influence.collecting import fit_dynamics as owner
        put_back = failing_on_one(owner, name, after)
        module, callback = Net(), InfluenceCallback(every_n_steps=1, dynamics=True)
        trainer, told = fit(module, f"{name}{after}", callback)
        put_back()
        assert all(torch.equal(a, b) for a, b in zip(module.parameters(), plain.parameters()))
        assert callback.num_collected == 16 and callback.factors.has_squares, (name, callback.num_collected)
        fails = name != "start_watching" or not after
        if fails and trainer.global_rank == 1:
            assert len(told) == 1 and "MemoryError: no room" in told[0], (name, after, told)
        last = name == "fold" and after > 1  # in the last epochs, after which processes may not meet again
        if fails and not last:
            assert callback.dynamics is None or not callback.dynamics.epochs, (name, after)
"""


@pytest.mark.slow
def test_failure_on_one_process_stops_the_dynamics_of_all(tmp_path):
    check_script(SCRIPT, tmp_path)
