"""Passes do what they say, and leave the Trainer and the module as they were."""

import random
import signal
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchmetrics import Accuracy, CatMetric, MeanMetric
from two_processes import check_script

from lightning_influence.running.loop_runner import LoopRunner
from lightning_influence.running.reading import prepare
from lightning_influence.running.trainer_runner import TrainerRunner
from lightning_influence.support.errors import (
    InfluenceError,
    InfluenceWarning,
    UnsupportedDataError,
    UnsupportedTrainerError,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*logging interval"),
]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Net(pl.LightningModule):
    def __init__(self, width=4):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(3, width), nn.BatchNorm1d(width), nn.Dropout(0.5), nn.Linear(width, 2)
        )
        self.calls = []

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.body(batch[0]), batch[1])
        self.log("loss", loss)
        self.log_dict({"twice": 2 * loss})
        if self.logger is not None:
            self.logger.experiment.log_metrics({"direct": 1.0})
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val", nn.functional.cross_entropy(self.body(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


# Not an attribute of the module: what a pass does to those is undone.
CALLS = []


class Hooked(Net):
    def on_before_batch_transfer(self, batch, dataloader_idx):
        CALLS.append(("before", dataloader_idx))
        return batch

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        CALLS.append(("transfer", dataloader_idx))
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        CALLS.append(("after", dataloader_idx))
        return [batch[0] * 2, batch[1]]


def make_data(n=21):
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(n, 3, generator=generator), torch.arange(n) % 2)


def make_loader(n=21, **options):
    return DataLoader(make_data(n), **{"batch_size": 4, "shuffle": True, "drop_last": True, **options})


def make_trainer(tmp_path, **options):
    defaults = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "default_root_dir": tmp_path,
    }
    return pl.Trainer(**{**defaults, **options})


class Gather:
    """Collects indices and the summed gradient of the training loss."""

    description = "Gathering"

    def __init__(self, action=None):
        self.seen = []
        self.total = 0.0
        self.action = action

    def step(self, module, batch, indices, dataloader_idx):
        loss = module.training_step(batch, 0) * len(indices)
        grads = torch.autograd.grad(loss, [p for p in module.parameters() if p.requires_grad])
        self.total = self.total + torch.cat([g.flatten() for g in grads]).double()
        self.seen.extend((dataloader_idx, i) for i in indices.tolist())
        if self.action is not None:
            self.action(module, batch)

    @property
    def indices(self):
        return [i for _, i in self.seen]


# ---------------------------------------------------------------- what is compared before and after

SIMPLE = (int, float, str, bool, type(None), tuple, torch.device, torch.dtype)


def snapshot(root):
    """Every attribute reachable from an object through Lightning's own objects: values, or identities."""
    found, alive, seen = {}, [], set()

    def walk(obj, path):
        if id(obj) in seen:
            return
        seen.add(id(obj))
        for name, value in vars(obj).items():
            key = f"{path}.{name}"
            alive.append(value)
            if isinstance(value, SIMPLE):
                found[key] = value
            elif isinstance(value, list | dict | set):
                items = value.items() if isinstance(value, dict) else value
                alive.extend(items)
                parts = [tuple(map(id, item)) if isinstance(value, dict) else id(item) for item in items]
                found[key] = (id(value), parts)
            else:
                found[key] = id(value)
                ours = type(value).__module__.startswith(("lightning.pytorch", "lightning.fabric"))
                if ours and not isinstance(value, nn.Module | pl.Callback | pl.LightningDataModule):
                    walk(value, key)

    walk(root, "trainer")
    found["SIGINT"], found["SIGTERM"] = map(signal.getsignal, (signal.SIGINT, signal.SIGTERM))
    return found, alive


def module_snapshot(module):
    return {
        "vars": {name: id(value) for name, value in vars(module).items()},
        "modes": {name: m.training for name, m in module.named_modules()},
        "weights": {name: t.clone() for name, t in module.state_dict().items()},
        "grads": {name: (p.grad, p.requires_grad) for name, p in module.named_parameters()},
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()],
        "trainer": module._trainer,
    }


def assert_same(before, after):
    changed = {key for key in {*before, *after} if before.get(key, "absent") != after.get(key, "absent")}
    assert not changed


def assert_same_module(before, after):
    weights = before.pop("weights"), after.pop("weights")
    grads = before.pop("grads"), after.pop("grads")
    assert before == after
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    for name, (grad, requires_grad) in grads[0].items():
        assert grads[1][name][0] is grad
        assert grads[1][name][1] == requires_grad


def rng_snapshot():
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


class Data(pl.LightningDataModule):
    def __init__(self):
        super().__init__()
        self.calls = []

    def prepare_data(self):
        self.calls.append("prepare")

    def setup(self, stage):
        self.calls.append(stage)
        if stage == "fit":
            self.train, _ = random_split(make_data(), [15, 6])
        if stage == "test":
            self.test = make_data(5)

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=4, shuffle=True)

    def test_dataloader(self):
        return DataLoader(self.test, batch_size=2)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.calls.append("after")
        return batch


class Counter(pl.Callback):
    """Stateful, and notices every hook that a pass lets it see."""

    def __init__(self):
        self.n, self.hooks = 0, []

    def on_train_batch_end(self, *_):
        self.n += 1

    def setup(self, trainer, pl_module, stage):
        self.hooks.append(("setup", stage))

    def on_predict_start(self, *_):
        self.hooks.append("predict")

    def on_exception(self, *_):
        self.hooks.append("exception")

    def state_dict(self):
        return {"n": self.n}

    def load_state_dict(self, state_dict):
        self.n = state_dict["n"]


def fitted(tmp_path, module=None, **options):
    """A Trainer that has fitted, with logger, bar, checkpoints and metrics: all that could be disturbed."""
    saver = ModelCheckpoint(dirpath=tmp_path, filename="saved", save_last=True)
    trainer = make_trainer(
        tmp_path,
        callbacks=[TQDMProgressBar(refresh_rate=5), Counter(), saver],
        logger=CSVLogger(tmp_path, name="logs", version=0),
        enable_checkpointing=True,
        enable_progress_bar=True,
        log_every_n_steps=1,
        **options,
    )
    module = Net() if module is None else module
    trainer.fit(module, make_loader(), make_loader(8, shuffle=False))
    return trainer, module


def unfitted(tmp_path):
    return make_trainer(tmp_path), Net()


def odd(module):
    """Give a module a state that is easily lost."""
    module.train()
    module.body[1].eval()
    module.body[3].bias.requires_grad_(False)
    module.body[0].weight.grad = torch.ones_like(module.body[0].weight)
    return module


def fail(module, batch):
    raise OSError("the step failed")


def interrupt(module, batch):
    raise KeyboardInterrupt


def disturb(module, batch):
    torch.rand(1), np.random.rand(), random.random()
    module.body(batch[0]).sum().backward()


def one_pass(trainer, module, step, loaders, **options):
    with TrainerRunner(trainer, module, **options) as runner:
        runner.run(step, loaders)


@pytest.mark.parametrize("make", [fitted, unfitted])
@pytest.mark.parametrize(
    ("action", "error"), [(None, None), (disturb, None), (fail, OSError), (interrupt, SystemExit)]
)
def test_trainer_and_module_are_as_before(tmp_path, make, action, error):
    trainer, module = make(tmp_path)
    odd(module)
    before, alive = snapshot(trainer)
    module_before, rng_before = module_snapshot(module), rng_snapshot()
    metrics = dict(trainer.callback_metrics)
    step = Gather(action)
    if error is None:
        one_pass(trainer, module, step, make_loader())
        assert step.indices == list(range(21))
    else:
        with pytest.raises(error):
            one_pass(trainer, module, step, make_loader())
    assert_same(before, snapshot(trainer)[0])
    assert_same_module(module_before, module_snapshot(module))
    assert rng_snapshot() == rng_before
    assert trainer.callback_metrics == metrics
    del alive


@pytest.mark.parametrize(
    "loaders",
    [
        lambda: [make_loader(5), make_loader(3)],
        lambda: CombinedLoader([make_loader(5), make_loader(3)], "sequential"),
    ],
)
def test_several_loaders(tmp_path, loaders):
    trainer, module = fitted(tmp_path)
    before, alive = snapshot(trainer)
    step = Gather()
    one_pass(trainer, module, step, loaders())
    assert step.seen == [(0, i) for i in range(5)] + [(1, i) for i in range(3)]
    assert_same(before, snapshot(trainer)[0])
    del alive


def test_ready_made_batches(tmp_path):
    step = Gather()
    batches = list(DataLoader(make_data(), batch_size=8))
    one_pass(*unfitted(tmp_path), step, batches)
    assert step.indices == list(range(21))


def reference(module, n=21):
    module = module.eval()
    x, y = make_data(n).tensors
    loss = nn.functional.cross_entropy(module.body(x), y, reduction="sum")
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()))]).double()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("outer", [torch.no_grad, torch.enable_grad])
def test_gradients_are_those_of_float32_in_eval_mode(tmp_path, precision, outer):
    torch.manual_seed(0)
    module = Net()
    step, loop = Gather(), Gather()
    with outer():
        one_pass(make_trainer(tmp_path, precision=precision), module, step, make_loader())
        LoopRunner(module).run(loop, make_loader())
    # Sums of 21 float32 gradients of order 1, in another order: a few units of 1e-7 each.
    torch.testing.assert_close(step.total, reference(module), rtol=1e-5, atol=5e-6)
    torch.testing.assert_close(loop.total, step.total, rtol=1e-5, atol=5e-6)
    assert loop.indices == step.indices == list(range(21))


def test_a_precision_that_converts_the_model_is_undone(tmp_path):
    module = Net()
    before = module_snapshot(module)
    dtypes = []
    step = Gather(lambda module, batch: dtypes.append((module.body[0].weight.dtype, batch[0].dtype)))
    one_pass(make_trainer(tmp_path, precision="64-true"), module, step, make_loader())
    assert set(dtypes) == {(torch.float64, torch.float64)}
    assert module.body[0].weight.dtype == module.body[1].running_mean.dtype == torch.float32
    assert_same_module(before, module_snapshot(module))


def test_the_step_sees_the_users_module_attached(tmp_path):
    trainer, module = unfitted(tmp_path)
    seen = []

    def look(inner, batch):
        seen.append((inner is module, inner.trainer is trainer, inner.device.type, inner.training))

    one_pass(trainer, module, Gather(look), make_loader())
    assert set(seen) == {(True, True, "cpu", False)}
    with pytest.raises(RuntimeError, match="not attached to a `Trainer`"):
        _ = module.trainer


@pytest.mark.parametrize("use", ["trainer", "loop"])
def test_transfer_hooks_run_once_a_batch(tmp_path, use):
    module = Hooked()
    CALLS.clear()
    runner = TrainerRunner(make_trainer(tmp_path), module) if use == "trainer" else LoopRunner(module)
    inputs = []
    step = Gather(lambda module, batch: inputs.append(batch[0]))
    runner.run(step, [make_loader(8), make_loader(4)])
    assert [(hook, i) for i in (0, 0, 1) for hook in ("before", "transfer", "after")] == CALLS
    assert torch.equal(torch.cat(inputs[:2]), 2 * make_data(8).tensors[0])


def test_nothing_reaches_the_loggers(tmp_path):
    trainer, module = fitted(tmp_path)
    log = Path(trainer.logger.log_dir) / "metrics.csv"
    before, files = log.read_text(), sorted(log.parent.iterdir())
    assert "loss" in before
    one_pass(trainer, module, Gather(), make_loader())
    assert log.read_text() == before
    assert sorted(log.parent.iterdir()) == files


def test_other_callbacks_do_not_run(tmp_path):
    trainer, module = fitted(tmp_path)
    counter = trainer.callbacks[1]
    seen = list(counter.hooks)
    with pytest.raises(OSError, match="the step failed"):
        one_pass(trainer, module, Gather(fail), make_loader())
    assert counter.hooks == seen


def test_fit_validate_and_predict_work_afterwards(tmp_path):
    trainer, module = fitted(tmp_path)
    one_pass(trainer, None, Gather(), make_loader())
    assert trainer.lightning_module is module
    assert len(trainer.validate(dataloaders=make_loader(8), verbose=False)) == 1
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, make_loader())
    assert trainer.current_epoch == 2
    module.predict_step = lambda batch, batch_idx: len(batch[0])
    assert trainer.predict(module, make_loader(8)) == [4, 4]
    assert trainer.predict_loop.inference_mode


def test_passes_from_on_fit_end(tmp_path):
    step = Gather()

    class AtEnd(pl.Callback):
        def on_fit_end(self, trainer, pl_module):
            one_pass(trainer, pl_module, step, make_loader())

    before = signal.getsignal(signal.SIGTERM)
    bar = RichProgressBar(console_kwargs={"force_terminal": True, "stderr": True})
    trainer = make_trainer(tmp_path, callbacks=[AtEnd(), bar], enable_progress_bar=True)
    trainer.fit(module := Net(), make_loader())
    assert step.indices == list(range(21))
    assert trainer.state.finished
    assert trainer.state.fn == "fit"
    assert signal.getsignal(signal.SIGTERM) is before
    trainer.fit(module, make_loader())


def test_passes_are_refused_within_a_step(tmp_path):
    trainer, module = unfitted(tmp_path)
    step = Gather(lambda *_: one_pass(trainer, module, Gather(), make_loader()))
    with pytest.raises(UnsupportedTrainerError, match=r"in the middle of predict\(\)"):
        one_pass(trainer, module, step, make_loader())


@pytest.mark.parametrize("kind", [RichProgressBar, TQDMProgressBar])
def test_the_bar_shows_the_passs_name(tmp_path, capsys, kind):
    options = {"console_kwargs": {"force_terminal": True}} if kind is RichProgressBar else {}
    trainer = make_trainer(tmp_path, callbacks=[kind(**options)], enable_progress_bar=True)
    one_pass(trainer, Net(), Gather(), make_loader())
    captured = capsys.readouterr()
    assert "Gathering" in captured.out + captured.err
    assert "Predicting" not in captured.out + captured.err
    assert trainer.callbacks[0].predict_description == "Predicting"


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("path", ["best", "last", "{}/saved.ckpt"])
def test_ckpt_path_loads_weights_once_and_the_asked_callback(tmp_path, path):
    trainer, module = fitted(tmp_path)
    saved = {name: t.clone() for name, t in module.state_dict().items()}
    collector, saver = trainer.callbacks[1], trainer.checkpoint_callback
    collected, collector.n, saver.best_model_score = collector.n, 0, "mine"
    hooks = list(collector.hooks)
    with torch.no_grad():
        module.body[0].weight.zero_()
    loads = []
    module.on_load_checkpoint = lambda checkpoint: loads.append(set(checkpoint))
    before, alive = snapshot(trainer)
    with TrainerRunner(trainer, ckpt_path=path.format(tmp_path), restore=[collector]) as runner:
        assert torch.equal(module.body[0].weight, saved["body.0.weight"])
        assert collector.n == collected > 0
        assert runner.restored == [collector]
        for _ in range(3):
            runner.run(Gather(), make_loader())
    assert len(loads) == 1
    assert collector.hooks == hooks
    assert saver.best_model_score == "mine"
    assert all(torch.equal(t, saved[name]) for name, t in module.state_dict().items())
    assert_same(before, snapshot(trainer)[0])
    del alive


def test_a_checkpoint_without_the_callback_restores_none(tmp_path):
    trainer, module = fitted(tmp_path)
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    collector = Counter()
    path = str(tmp_path / "weights.ckpt")
    with TrainerRunner(make_trainer(tmp_path), Net(), ckpt_path=path, restore=[collector]) as runner:
        assert runner.restored == []
        assert torch.equal(runner.module.body[0].weight, module.body[0].weight)


def test_a_checkpoint_of_another_model_changes_nothing(tmp_path):
    fitted(tmp_path)
    trainer, module = make_trainer(tmp_path), odd(Net(width=5))
    before, alive = snapshot(trainer)
    module_before = module_snapshot(module)
    with (
        pytest.raises(RuntimeError, match="size mismatch"),
        TrainerRunner(trainer, module, ckpt_path=str(tmp_path / "saved.ckpt")),
    ):
        pass
    assert_same(before, snapshot(trainer)[0])
    assert_same_module(module_before, module_snapshot(module))
    del alive


def test_a_users_own_ckpt_path_is_left_for_the_user(tmp_path):
    trainer, module = fitted(tmp_path)
    trainer.ckpt_path = str(tmp_path / "absent.ckpt")
    one_pass(trainer, module, Gather(), make_loader())
    assert trainer.ckpt_path == str(tmp_path / "absent.ckpt")


def test_a_model_that_is_built_late(tmp_path):
    class Late(Net):
        def __init__(self):
            super().__init__()
            self.head = None

        def setup(self, stage):
            self.calls.append(("setup", stage))

        def teardown(self, stage):
            self.calls.append(("teardown", stage))

        def configure_model(self):
            self.calls.append("configure")
            if self.head is None:
                self.head = nn.Linear(2, 2)

    done = Late()
    done.configure_model()
    trainer = make_trainer(tmp_path)
    trainer.strategy.connect(done)
    trainer.save_checkpoint(tmp_path / "late.ckpt", weights_only=True)
    module = Late()
    with TrainerRunner(make_trainer(tmp_path), module, ckpt_path=str(tmp_path / "late.ckpt")) as runner:
        assert torch.equal(module.head.weight, done.head.weight)
        runner.run(type("Look", (), {"description": "look", "step": lambda *_: None})(), make_loader())
    assert module.calls == [("setup", "predict"), "configure", ("teardown", "predict")]


def test_a_fitted_model_is_not_set_up_again(tmp_path):
    class SetUp(Net):
        def setup(self, stage):
            self.calls.append(stage)

    trainer, module = fitted(tmp_path, SetUp())
    module.calls.clear()
    one_pass(trainer, module, Gather(), make_loader())
    assert module.calls == []


# ---------------------------------------------------------------- datamodules


def test_a_datamodule_gives_its_train_and_query_loaders(tmp_path):
    trainer, module, data = make_trainer(tmp_path), Net(), Data()
    before, alive = snapshot(trainer)
    shown = []
    train, query = Gather(lambda module, _: shown.append(module.trainer.datamodule)), Gather()
    with TrainerRunner(trainer, module, datamodule=data) as runner:
        runner.run(train, runner.train_dataloaders())
        runner.run(query, runner.query_dataloaders())
    assert train.indices == list(range(15))
    assert query.indices == list(range(5))
    assert data.calls == ["prepare", "fit", *["after"] * 4, "test", *["after"] * 3]
    assert set(shown) == {data}
    assert data.trainer is None
    assert_same(before, snapshot(trainer)[0])
    del alive


def test_a_fitted_datamodule_is_not_split_anew(tmp_path):
    trainer, module, data = make_trainer(tmp_path), Net(), Data()
    trainer.fit(module, datamodule=data)
    split = list(data.train.indices)
    before, alive = snapshot(trainer)
    with TrainerRunner(trainer, datamodule=data) as runner:
        runner.run(Gather(), runner.train_dataloaders())
    assert list(data.train.indices) == split
    assert data.calls.count("fit") == 1
    assert trainer.datamodule is data
    assert data.trainer is trainer
    assert_same(before, snapshot(trainer)[0])
    del alive


def test_the_datamodule_of_the_fit_is_not_run_when_not_asked_for(tmp_path):
    trainer, data = make_trainer(tmp_path), Data()
    trainer.fit(Net(), datamodule=data)
    calls, shown = list(data.calls), []
    one_pass(trainer, Net(), Gather(lambda module, _: shown.append(module.trainer.datamodule)), make_loader())
    assert data.calls == calls
    assert set(shown) == {data}


def test_a_datamodule_that_fails_leaves_nothing(tmp_path):
    class Broken(Data):
        def setup(self, stage):
            raise OSError("no data")

        def teardown(self, stage):
            self.calls.append("teardown")

    trainer, module = fitted(tmp_path)
    before, alive = snapshot(trainer)
    module_before = module_snapshot(module)
    data = Broken()
    with pytest.raises(OSError, match="no data"), TrainerRunner(trainer, module, datamodule=data):
        pass
    assert_same(before, snapshot(trainer)[0])
    assert_same_module(module_before, module_snapshot(module))
    assert data.calls == ["prepare", "teardown"]
    del alive


def test_a_module_can_give_the_loaders(tmp_path):
    class Own(Net):
        def train_dataloader(self):
            return make_loader(6)

    with TrainerRunner(make_trainer(tmp_path), Own()) as runner:
        step = Gather()
        runner.run(step, runner.train_dataloaders())
        assert step.indices == list(range(6))
        with pytest.raises(
            UnsupportedDataError, match="Own defines none of predict_dataloader, test_dataloader"
        ):
            runner.query_dataloaders()


# ---------------------------------------------------------------- limits, errors, records


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"limit_predict_batches": 1}, "limit_predict_batches"),
        ({"limit_predict_batches": 0.5}, "limit_predict_batches"),
        ({"limit_predict_batches": 0}, "limit_predict_batches"),
        ({"fast_dev_run": True}, "fast_dev_run"),
    ],
)
def test_limits_do_not_truncate(tmp_path, options, name):
    trainer, step = make_trainer(tmp_path, **options), Gather()
    limit = trainer.limit_predict_batches
    with pytest.warns(InfluenceWarning, match=f"The Trainer's {name} limits prediction"):
        one_pass(trainer, Net(), step, make_loader())
    assert step.indices == list(range(21))
    assert trainer.limit_predict_batches == limit


def test_overfit_batches_do_not_cut_a_pass_and_are_pointed_out(tmp_path):
    step = Gather()
    with pytest.warns(InfluenceWarning, match=r"overfit_batches=1 lets a fit see part of the training"):
        one_pass(make_trainer(tmp_path, overfit_batches=1), Net(), step, make_loader())
    assert step.indices == list(range(21))


def stop(module, batch):
    raise StopIteration


def test_a_pass_that_ends_early_is_an_error(tmp_path):
    with pytest.raises(InfluenceError, match=r"Pass 'Gathering' ended after 0 of 21 examples.*StopIteration"):
        one_pass(*unfitted(tmp_path), Gather(stop), make_loader())


def test_without_a_model(tmp_path):
    with pytest.raises(TypeError, match="No model: pass one, or call fit first"):
        TrainerRunner(make_trainer(tmp_path))


def test_a_runner_is_entered_once(tmp_path):
    for runner in (TrainerRunner(*unfitted(tmp_path)), LoopRunner(Net())):
        with runner, pytest.raises(InfluenceError, match="This runner is in use"):
            runner.__enter__()
        runner.run(Gather(), make_loader())  # borrows for this one pass


def test_inference_mode_is_refused(tmp_path):
    with torch.inference_mode():
        with pytest.raises(UnsupportedTrainerError, match="inference_mode"):
            TrainerRunner(*unfitted(tmp_path)).run(Gather(), [torch.zeros(1)])
        with pytest.raises(InfluenceError, match="inference_mode"):
            LoopRunner(Net()).run(Gather(), [torch.zeros(1)])


def test_records(tmp_path):
    loader = prepare(make_loader())
    for runner in (TrainerRunner(*unfitted(tmp_path)), LoopRunner(Net(), progress=True)):
        with runner:
            first = runner.run(Gather(), loader)
            runner.run(Gather(), make_loader(5))
        assert runner.records[0] is first
        assert [(r.name, r.batches, r.examples) for r in runner.records] == [
            ("Gathering", 6, 21),
            ("Gathering", 2, 5),
        ]
        assert all(0 < r.seconds < 60 for r in runner.records)


def test_reductions_on_one_process(tmp_path):
    tensor = torch.arange(3.0)
    for runner in (TrainerRunner(*unfitted(tmp_path)), LoopRunner(Net())):
        assert runner.world_size == 1
        assert runner.all_reduce_sum(tensor) is tensor
        assert runner.all_gather_cat(tensor) is tensor


@pytest.mark.parametrize("error", [None, OSError])
def test_loop_runner_leaves_the_module(error):
    module = odd(Net())
    before, rng = module_snapshot(module), rng_snapshot()
    if error is None:
        LoopRunner(module).run(Gather(disturb), make_loader())
    else:
        with pytest.raises(error):
            LoopRunner(module).run(Gather(fail), make_loader())
    assert_same_module(before, module_snapshot(module))
    assert rng_snapshot() == rng


@pytest.mark.parametrize("use", ["trainer", "loop"])
def test_hooks_on_compiled_submodules_fire(tmp_path, use):
    module = Net()
    linear = module.body[3]
    module.body[3] = torch.compile(linear, backend="eager")
    module.body(make_data(4).tensors[0])  # compiled without hooks from here on
    fired = []
    handle = linear.register_forward_hook(lambda *_: fired.append(1))
    runner = TrainerRunner(make_trainer(tmp_path), module) if use == "trainer" else LoopRunner(module)
    runner.run(Gather(), make_loader())
    handle.remove()
    assert len(fired) == 6


# ---------------------------------------------------------------- two processes

SCRIPT = """
import sys, warnings
import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from lightning_influence.running.trainer_runner import TrainerRunner

torch.set_num_threads(1)
warnings.simplefilter("ignore")


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 2)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.body(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Shuffled:
    def __iter__(self):
        return iter(torch.randperm(21).split(4))  # other batches on every process

    def __len__(self):
        return 6


class Step:
    description = "step"

    def __init__(self):
        self.seen, self.total = [], torch.zeros(8, dtype=torch.float64)

    def step(self, module, batch, indices, dataloader_idx):
        loss = module.training_step(batch, 0) * len(indices)
        self.total += torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()))])
        self.seen.append(indices)
        assert torch.equal(batch[0][:, 0].long(), indices)


torch.manual_seed(0)
x = torch.randn(21, 3)
x[:, 0] = torch.arange(21)
data = TensorDataset(x, torch.arange(21) % 2)
trainer = pl.Trainer(
    max_epochs=1, accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False, default_root_dir=sys.argv[1],
)
module = Net()
loaders = [
    DataLoader(data, batch_size=4, shuffle=True, drop_last=True),
    DataLoader(data, batch_sampler=Shuffled()),
    DataLoader(torch.utils.data.Subset(data, [0]), batch_size=4),
]


def check(runner):
    for loader, n in zip(loaders, (21, 21, 1)):
        step = Step()
        torch.manual_seed(trainer.global_rank)
        record = runner.run(step, loader)
        mine = torch.cat(step.seen) if step.seen else torch.zeros(0, dtype=torch.int64)
        assert record.examples == n
        if n == 21:
            assert len(mine) in ((11, 10)[trainer.global_rank], 12, 9)
        everyone = runner.all_gather_cat(mine)
        assert everyone.sort().values.tolist() == list(range(n)), everyone
        total = runner.all_reduce_sum(step.total)
        assert total is step.total
        xs, ys = x[:n], data.tensors[1][:n]
        loss = nn.functional.cross_entropy(module.body(xs), ys, reduction="sum")
        expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()))])
        torch.testing.assert_close(total.float(), expected, rtol=1e-4, atol=1e-4)
        gathered = runner.all_gather_cat(torch.full((trainer.global_rank, 2), 1.5))
        assert gathered.shape == (1, 2) and gathered.dtype == torch.float32


with TrainerRunner(trainer, module) as runner:
    assert runner.world_size == 2
    check(runner)
trainer.fit(module, DataLoader(data, batch_size=4, shuffle=True))
with TrainerRunner(trainer) as runner:
    check(runner)
trainer.fit_loop.max_epochs = 2
trainer.fit(module, DataLoader(data, batch_size=4))
assert trainer.current_epoch == 2
"""


def test_two_processes_share_every_pass(tmp_path):
    check_script(SCRIPT, tmp_path)


class Counting(pl.LightningModule):
    """A step that keeps metrics and a buffer, as users' steps do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("seen", torch.zeros(()))
        self.metrics = nn.ModuleList([MeanMetric(), CatMetric(), Accuracy("multiclass", num_classes=2)])

    def count(self, x):
        self.seen += len(x)
        self.metrics[0].update(x)
        self.metrics[1].update(x)
        self.metrics[2](self.layer(x), torch.zeros(len(x)))


@pytest.mark.parametrize("kind", ["trainer", "loop"])
def test_metrics_and_buffers_are_as_before(tmp_path, kind):
    class Step:
        description = "count"

        def step(self, module, batch, indices, dataloader_idx):
            module.count(batch[0])

    def values():
        metrics = module.metrics
        return [float(module.seen), *(float(m.compute().sum()) for m in metrics), metrics[2]._update_count]

    module = Counting()
    module.count(torch.ones(3, 2))
    before = values()
    host = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    runner = TrainerRunner(host, module) if kind == "trainer" else LoopRunner(module)
    with runner:
        for _ in range(2):
            runner.run(Step(), DataLoader(TensorDataset(torch.rand(5, 2)), 2))
    assert values() == before
