"""Training dynamics of real fits, against a module that writes down each example's loss by itself."""

import copy
import itertools
import pickle
import warnings

import numpy as np
import pytest
import torch
from callback_models import Classifier, fit, loader, trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, WeightedRandomSampler
from torch.utils.data import dataloader as torch_dataloader

from lightning_influence.api.dynamics import training_dynamics
from lightning_influence.collecting import pace, stopwatch, watching
from lightning_influence.collecting.callback import InfluenceCallback
from lightning_influence.running.host.indices import IndexWatch
from lightning_influence.support.errors import InfluenceWarning, UnsupportedTrainerError


class Diary(Classifier):
    """Batches hold the index of each example, and the step writes losses and margins down by it."""

    def __init__(self, **options):
        super().__init__(**options)
        self.epochs: dict[int, dict[int, list[tuple[float, float]]]] = {}

    def on_save_checkpoint(self, checkpoint):
        checkpoint["diary"] = copy.deepcopy(self.epochs)

    def on_load_checkpoint(self, checkpoint):
        self.epochs = checkpoint["diary"]

    def training_step(self, batch, batch_idx):
        x, y, indices = batch
        outputs = self.net(x)
        with torch.no_grad():
            losses = functional.cross_entropy(outputs, y, reduction="none")
            others = outputs.scatter(1, y[:, None], float("-inf")).amax(1)
            margins = outputs.gather(1, y[:, None])[:, 0] - others
            for row in zip(indices.tolist(), losses.tolist(), margins.tolist(), strict=True):
                epoch = self.epochs.setdefault(self.current_epoch, {})
                epoch.setdefault(row[0], []).append(row[1:])
        return self.make_loss(outputs, y)

    def make_loss(self, outputs, y):
        return functional.cross_entropy(outputs, y, reduction=self.reduction)


def data(count=23, batch=4, **options):
    x, y = (t[:count] for t in loader(count).dataset.tensors)
    return DataLoader(TensorDataset(x, y, torch.arange(count)), batch, **{"shuffle": True, **options})


def check(host, module, left_out=()):
    """Compare every figure with the diary, of which some epochs are left out."""
    found = training_dynamics(host, log=False)
    assert found.epochs == len(module.epochs)
    assert found.watched == len(module.epochs) - len(left_out)
    all_numbers = [number for number in sorted(module.epochs) if number not in left_out]
    epochs = [module.epochs[number] for number in all_numbers]
    seen = sorted(set().union(*epochs))
    assert found.train_indices.tolist() == seen
    for row, index in enumerate(seen):
        values = np.array([np.mean(epoch[index], 0) for epoch in epochs if index in epoch])
        shares = [np.mean([m > 0 for _, m in epoch[index]]) for epoch in epochs if index in epoch]
        right = [share > 0.5 for share in shares]
        numbers = [number for number, epoch in zip(all_numbers, epochs, strict=True) if index in epoch]
        learned = [number for number, is_right in zip(numbers, right, strict=True) if is_right]
        assert float(found.loss_mean[row]) == pytest.approx(values[:, 0].mean(), rel=1e-4, abs=1e-6)
        assert float(found.loss_spread[row]) == pytest.approx(values[:, 0].std(), rel=1e-2, abs=1e-4)
        assert float(found.margin_mean[row]) == pytest.approx(values[:, 1].mean(), rel=1e-4, abs=1e-5)
        assert int(found.epochs_seen[row]) == len(values)
        assert int(found.epochs_right[row]) == sum(right)
        assert int(found.forgotten[row]) == sum(a and not b for a, b in itertools.pairwise(right))
        assert int(found.first_learned[row]) == (learned[0] if learned else -1)
    assert found.diagnostics.extra["batches_missed"] == 0
    return found


LOADERS = {
    "shuffled": data,
    "in order": lambda: data(shuffle=False),
    "workers": lambda: data(num_workers=2),
    "workers that stay": lambda: data(num_workers=2, persistent_workers=True),
    "drawn with repeats": lambda: data(
        shuffle=False, sampler=WeightedRandomSampler(torch.rand(23).tolist(), 30)
    ),
    "last batch dropped": lambda: data(drop_last=True),
}


class NoLength:
    """A batch sampler whose length nobody knows, so that Lightning fetches ahead."""

    def __iter__(self):
        order = torch.randperm(23).tolist()
        yield from (order[start : start + 4] for start in range(0, 23, 4))


@pytest.mark.parametrize("name", LOADERS)
def test_dynamics_are_those_of_a_diary(name):
    module = Diary()
    check(fit(module, InfluenceCallback(dynamics=True), data=LOADERS[name]()), module)


@pytest.mark.parametrize("name", ["stream", "own loss"])
def test_indices_that_nobody_needs_are_not_noted(monkeypatch, name):
    noted = []
    monkeypatch.setattr(IndexWatch, "_note", lambda self, iterator, index: noted.append(index))
    make, batches, _ = UNSEEN[name]
    for epochs in (2, 8):
        noted.clear()
        trainer(InfluenceCallback(), max_epochs=epochs).fit(make(), batches())
        assert len(noted) <= 5  # of the first epoch, before that was known


def test_torch_is_left_as_it_was():
    iterator = torch_dataloader._BaseDataLoaderIter
    before = iterator._next_index
    fit(Diary(), InfluenceCallback(dynamics=True), data=data(), max_epochs=1)
    assert iterator._next_index is before
    assert not IndexWatch._open
    with pytest.raises(RuntimeError, match="twice"):
        fit(Fails(), InfluenceCallback(dynamics=True), data=data(), max_epochs=1)
    assert iterator._next_index is before


class Fails(Diary):
    def on_train_batch_end(self, outputs, batch, batch_idx):
        if len(self.epochs) == self.trainer.max_epochs - 1 or self.trainer.max_epochs == 1:
            raise RuntimeError("the same mistake twice")


def test_batches_that_are_fetched_ahead_keep_their_indices():
    module, host = Diary(), trainer(InfluenceCallback(dynamics=True))
    host.fit(module, DataLoader(data().dataset, batch_sampler=NoLength()))
    assert len(module.epochs) == 4
    check(host, module)


OPTIONS = {
    "accumulated": {"accumulate_grad_batches": 3},
    "cut short": {"limit_train_batches": 2},
    "by steps": {"max_epochs": -1, "max_steps": 11},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_dynamics_do_not_depend_on_how_the_trainer_steps(name):
    module = Diary()
    check(fit(module, InfluenceCallback(dynamics=True), data=data(), **OPTIONS[name]), module)


def test_a_cut_epoch_of_workers_that_stay_leaves_nothing_behind():
    module = Diary()
    loaders = data(num_workers=2, persistent_workers=True)
    check(fit(module, InfluenceCallback(dynamics=True), data=loaders, limit_train_batches=2), module)


class Sum(Diary):
    def make_loss(self, outputs, y):
        return functional.cross_entropy(outputs, y, reduction="none").sum() * 0.1 / 0.1


class Manual(Diary):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.optimizers().zero_grad()
        self.manual_backward(loss)
        self.optimizers().step()


class Validated(Diary):
    """A validation in the middle of an epoch, and other passes over the training loader."""

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == 2:
            for _ in self.trainer.train_dataloader:
                pass

    def validation_step(self, batch, batch_idx):
        self.log("loss", functional.cross_entropy(self.net(batch[0]), batch[1]))


@pytest.mark.parametrize("make", [Sum, Manual])
def test_losses_are_found_in_steps_of_all_kinds(make):
    module = make()
    check(fit(module, InfluenceCallback(dynamics=True), data=data()), module)


def test_other_passes_over_the_same_loader_confuse_nothing():
    module, host = Validated(), trainer(InfluenceCallback(dynamics=True), val_check_interval=3)
    host.fit(module, data(), data(shuffle=False))
    check(host, module)


def test_a_fit_that_stops_or_fails_has_dynamics_up_to_there():
    module = Validated()
    host = trainer(
        InfluenceCallback(dynamics=True), EarlyStopping("loss", patience=0, min_delta=9.0), max_epochs=9
    )
    host.fit(module, data(), data())
    assert len(module.epochs) < 9
    check(host, module)

    module, host = Fails(), trainer(InfluenceCallback(dynamics=True))
    with pytest.raises(RuntimeError, match="twice"):
        host.fit(module, data())
    assert len(module.epochs) == 3
    check(host, module)


@pytest.mark.parametrize("every", [{"every_n_epochs": 1}, {"every_n_train_steps": 8}])
def test_dynamics_go_on_after_a_resumption(tmp_path, every):
    first = Diary()
    saving = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{step}", **every)
    fit(first, InfluenceCallback(dynamics=True), saving, data=data(), max_epochs=2)
    paths = sorted(tmp_path.glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1].split("-")[0]))
    again = Diary()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's of resuming in the middle of an epoch
        host = fit(again, InfluenceCallback(dynamics=True), data=data(), ckpt_path=paths[0], max_epochs=4)
    assert len(again.epochs) == 4
    found = check(host, again)
    assert found.diagnostics.extra["batches"] > 6 * 3


def test_a_checkpoint_alone_has_the_dynamics(tmp_path):
    module = Diary()
    host = fit(module, InfluenceCallback(dynamics=True), data=data())
    found = check(host, module)
    host.save_checkpoint(tmp_path / "a.ckpt")
    read = training_dynamics(trainer(), ckpt_path=tmp_path / "a.ckpt", log=False)
    assert torch.equal(read.loss_mean, found.loss_mean)
    assert torch.equal(read.first_learned, found.first_learned)
    plain = trainer()
    plain.fit(Classifier(), loader())
    plain.save_checkpoint(tmp_path / "b.ckpt")
    with pytest.raises(UnsupportedTrainerError, match=r"no training dynamics in the checkpoint .*b\.ckpt"):
        training_dynamics(trainer(), ckpt_path=tmp_path / "b.ckpt")


def test_a_second_fit_continues_and_another_dataset_begins_anew():
    callback, module = InfluenceCallback(dynamics=True), Diary()
    host = trainer(callback, max_epochs=2)
    host.fit(module, data())
    host.fit_loop.max_epochs = 3
    host.fit(module, data())
    found = check(host, module)
    assert any("An earlier fit of the same weights" in note for note in found.diagnostics.warnings)
    module.epochs = {}
    other = trainer(callback, max_epochs=1)
    other.fit(module, data(16))
    assert not check(other, module).diagnostics.warnings


class Stream(IterableDataset):
    def __iter__(self):
        return iter(TensorDataset(*loader().dataset.tensors))


class OwnLoss(Classifier):
    def training_step(self, batch, batch_idx):
        return (self.net(batch[0]) - functional.one_hot(batch[1], 3)).square().mean()


class Twice(Classifier):
    """Two backward passes in one step."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for _ in range(2):
            self.optimizers().zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            self.optimizers().step()


class Sorted(Classifier):
    """Rows of its losses are in another order than the batch's, which their values do not show."""

    def training_step(self, batch, batch_idx):
        order = batch[0][:, 0].argsort()
        losses = functional.cross_entropy(self.net(batch[0][order]), batch[1][order], reduction="none")
        return losses[order.argsort()].mean()


class Several(Classifier):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch["a"], batch_idx)


UNSEEN = {
    "stream": (Classifier, lambda: DataLoader(Stream(), 8), "Stream has no length or no indices"),
    "several loaders": (Several, lambda: {"a": loader(), "b": loader()}, "training loader is a dict"),
    "own loss": (OwnLoss, loader, "no loss function was seen"),
    "sorted inside": (Sorted, loader, "rows in another order"),
    "two backward passes": (Twice, loader, "several backward passes"),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_what_is_not_seen_is_said_once_and_ends_nothing(name):
    make, batches, reason = UNSEEN[name]
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        host = trainer(InfluenceCallback(dynamics=True), max_epochs=3)
        host.fit(make(), batches())
    assert host.current_epoch == 3
    told = [str(w.message) for w in record if "raining dynamics" in str(w.message)]
    assert len(told) == 1
    assert reason in told[0]
    assert "dynamics=False" in told[0]
    with pytest.raises(
        UnsupportedTrainerError, match=f"There are no training dynamics in its Influence.*{reason}"
    ):
        training_dynamics(host)
    assert torch.overrides._len_torch_function_stack() == 0


class Arranged(Diary):
    """Steps that rearrange some batches, after two that were in order: by their labels, or all but those."""

    def __init__(self, how):
        super().__init__(p=0.0)
        self.how = how

    def make_loss(self, outputs, y):
        order = y.argsort(stable=True)
        if self.how == "gathered":
            outputs, y = outputs.gather(0, order[:, None].expand_as(outputs)), y.gather(0, order)
        elif self.how == "stacked":
            places = order.tolist()
            outputs, y = torch.stack([outputs[n] for n in places]), torch.stack([y[n] for n in places])
        elif self.how == "indexed":
            outputs, y = outputs[order], y[order]
        elif bool((y.diff() < 0).any()):
            outputs, y = outputs.flip(0), y.flip(0)
        return functional.cross_entropy(outputs, y)


@pytest.mark.parametrize("how", ["gathered", "stacked", "indexed", "flipped"])
def test_batches_that_are_rearranged_after_others_that_were_not_are_missed(how):
    labels = [0, 0, 1, 2, 0, 1, 1, 2, 2, 1, 0, 0, 1, 2, 0, 1, 0, 0, 1, 2]
    x = data(20).dataset.tensors[0]
    batches = DataLoader(TensorDataset(x, torch.tensor(labels), torch.arange(20)), 4)
    module = Arranged(how)
    with pytest.warns(InfluenceWarning, match="Training dynamics lack 8 of 20 batches"):
        found = training_dynamics(fit(module, InfluenceCallback(dynamics=True), data=batches), log=False)
    seen = [n for n in range(20) if n // 4 not in {2, 3}]
    assert found.train_indices.tolist() == seen
    for row, index in enumerate(seen):
        losses = [own[0] for epoch in module.epochs.values() for own in epoch[index]]
        assert float(found.loss_mean[row]) == pytest.approx(np.mean(losses), rel=1e-4)


def test_values_that_left_torch_may_be_in_any_order():
    class Numbers(Classifier):
        def training_step(self, batch, batch_idx):
            order = np.argsort(batch[1].numpy(), kind="stable")
            x, y = (torch.from_numpy(part.numpy()[order]) for part in batch)
            return functional.cross_entropy(self.net(x), y)

    with pytest.warns(InfluenceWarning, match="rows in another order"):
        fit(Numbers(), InfluenceCallback(dynamics=True), max_epochs=1)


def test_batches_that_are_missed_are_counted():
    class Sometimes(Classifier):
        def training_step(self, batch, batch_idx):
            if batch_idx == 3:
                return (self.net(batch[0]) - functional.one_hot(batch[1], 3)).square().mean()
            return super().training_step(batch, batch_idx)

    with pytest.warns(InfluenceWarning, match="Training dynamics lack 4 of 20 batches: The training loss"):
        host = fit(Sometimes(), InfluenceCallback(dynamics=True), max_epochs=4)
    found = training_dynamics(host, log=False)
    assert found.diagnostics.extra["batches_missed"] == 4
    assert any("Of 20 batches, 4 were not seen" in warning for warning in found.diagnostics.warnings)
    assert int(found.epochs_seen.max()) <= 4


class Timed(Diary):
    """A step takes a second by a clock that goes on by a little whenever it is read."""

    now, left_out, tick = 0.0, (), 0.016

    def read(self):
        self.now += self.tick
        return self.now

    def training_step(self, batch, batch_idx):
        self.now += 1.0
        self.look()
        return super().training_step(batch, batch_idx)

    def on_train_epoch_end(self):
        self.look()

    def look(self):
        timer = self.trainer.callbacks[0]._dynamics._watching._pace
        self.spent = timer.spent
        if timer.rests:
            self.left_out = tuple({*self.left_out, self.current_epoch})


TIMED = {"plain": data, "workers that stay": LOADERS["workers that stay"]}


@pytest.mark.parametrize("name", TIMED)
def test_unasked_dynamics_leave_out_whole_epochs_to_stay_within_a_share_of_the_time(monkeypatch, name):
    module = Timed()
    monkeypatch.setattr(stopwatch, "read_clock", module.read)
    monkeypatch.setattr(pace, "_GRACE", 0.12)  # gives up the first epoch before its end
    host = trainer(InfluenceCallback(overhead=0.1, every_n_steps=10**6), max_epochs=30)
    host.fit(module, TIMED[name]())
    watched = 30 - len(module.left_out)
    assert 0 in module.left_out
    assert 5 < watched < 25
    found = check(host, module, module.left_out)
    assert found.diagnostics.extra["epochs_skipped"] == len(module.left_out)
    assert any("more than a fifth of the callback's overhead" in note for note in found.diagnostics.warnings)
    assert 0.01 * module.now < module.spent < 0.02 * module.now + 0.2


def test_unasked_dynamics_of_a_fit_without_time_say_so(monkeypatch):
    module = Timed()
    module.tick = 1.0
    monkeypatch.setattr(stopwatch, "read_clock", module.read)
    host = fit(module, InfluenceCallback(overhead=0.1, every_n_steps=10**6), data=data(), max_epochs=3)
    with pytest.raises(UnsupportedTrainerError, match=r"a fifth of the callback's overhead.*dynamics=True"):
        training_dynamics(host)


def test_unasked_dynamics_of_a_short_fit_are_whole_and_others_are_not_missed(monkeypatch):
    module = Diary()
    check(fit(module, InfluenceCallback(), data=data()), module)
    with monkeypatch.context() as patched:
        patched.setattr(watching, "_MOST_UNASKED", 22)
        with pytest.raises(UnsupportedTrainerError, match="more than 22 examples, of which none are kept"):
            training_dynamics(fit(Diary(), InfluenceCallback(), data=data()))
    for make, batches, reason in UNSEEN.values():
        with warnings.catch_warnings(record=True) as record:
            warnings.simplefilter("always")
            host = trainer(InfluenceCallback(), max_epochs=2)
            host.fit(make(), batches())
        assert not [str(w.message) for w in record if "ynamics" in str(w.message)]
        with pytest.raises(
            UnsupportedTrainerError, match=f"There are no training dynamics in its Influence.*{reason}"
        ):
            training_dynamics(host)


def test_functions_that_pass_the_watch_count_as_its_time(monkeypatch):
    module = Sum()
    monkeypatch.setattr(pace, "time_call", lambda: 2.0)  # three functions a step at least
    host = fit(module, InfluenceCallback(), data=data(), max_epochs=3)
    with pytest.raises(UnsupportedTrainerError, match=r"a fifth of the callback's overhead"):
        training_dynamics(host)


def test_dynamics_can_be_switched_off():
    callback = InfluenceCallback(dynamics=False)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        host = fit(OwnLoss(), callback, max_epochs=1)
    assert not [w for w in record if "dynamics" in str(w.message)]
    assert callback.dynamics is None
    with pytest.raises(UnsupportedTrainerError, match=r"Fit with InfluenceCallback\(dynamics=True\)"):
        training_dynamics(host)
    with pytest.raises(ValueError, match="dynamics='yes'"):
        InfluenceCallback(dynamics="yes")


def test_a_collate_of_the_users_is_told_of():
    def collate(rows):
        return torch.utils.data.default_collate(rows)

    host = fit(Diary(), InfluenceCallback(dynamics=True), data=data(collate_fn=collate), max_epochs=1)
    found = training_dynamics(host, log=False)
    assert any("collate_fn of its own" in warning for warning in found.diagnostics.warnings)


def test_regression_has_losses_alone():
    class Regression(Diary):
        def training_step(self, batch, batch_idx):
            return functional.mse_loss(self.net(batch[0]), functional.one_hot(batch[1], 3).float())

    found = training_dynamics(fit(Regression(), InfluenceCallback(dynamics=True), data=data()), log=False)
    assert found.margin_mean is None
    assert found.loss_mean.shape == (23,)
    with pytest.raises(ValueError, match="by='late', but the loss has no labels"):
        found.top(3, by="late")


def test_a_plain_trainer_answers_and_survives_pickling():
    host = fit(Diary(), InfluenceCallback(dynamics=True), data=data(), max_epochs=1)
    assert host.training_dynamics(log=False).epochs == 1
    again = pickle.loads(pickle.dumps(host.callbacks[0]))
    assert torch.equal(again.dynamics.floats, host.callbacks[0].dynamics.floats)
