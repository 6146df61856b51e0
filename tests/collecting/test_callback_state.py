"""The callback's state: checkpoints, resuming, repeated fits, and the Trainer it is attached to."""

from __future__ import annotations

import pickle
import warnings

import lightning
import pytest
import torch
from callback_models import Classifier, fit, loader, same, tensors, trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_influence.collecting.callback import InfluenceCallback
from lightning_influence.curvature.factors import fingerprint
from lightning_influence.support.errors import FactorMismatchError, InfluenceWarning


class Reseed(lightning.Callback):
    """Makes dropout depend on the batch's number, so that a resumed run draws the same."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        torch.manual_seed(1000 * trainer.current_epoch + batch_idx)


class Repeated(Classifier):
    """The same batch five times: a loader that resumes in the middle of an epoch by itself."""

    def train_dataloader(self):
        data = next(iter(torch.utils.data.DataLoader(loader().dataset, 8)))
        return torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(*(t.repeat(5, *[1] * (t.ndim - 1)) for t in data)), 8
        )


@pytest.mark.grid
@pytest.mark.parametrize(
    "every",
    [
        pytest.param({"every_n_epochs": 1}, id="epoch"),
        pytest.param(
            {"every_n_train_steps": 13},
            id="middle",
            # Without the callback, too, weights differ after resuming with Lightning 2.4.
            marks=pytest.mark.skipif(lightning.__version__ < "2.6", reason="Lightning resumes otherwise"),
        ),
    ],
)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_resumed_run_ends_in_the_same_state_to_the_last_bit(tmp_path, every, optimizer) -> None:
    def run(callback, folder, ckpt_path=None):
        checkpoint = ModelCheckpoint(tmp_path / folder, save_top_k=-1, filename="{step}", **every)
        host = trainer(Reseed(), callback, checkpoint, max_epochs=8)
        torch.manual_seed(3)
        module = Repeated(optimizer)
        host.fit(module, ckpt_path=ckpt_path)
        return host, module

    whole, resumed = (InfluenceCallback(overhead=0.9, dynamics=True) for _ in range(2))
    with torch.random.fork_rng(devices=[]):
        _, module = run(whole, "whole")
        paths = sorted(
            (tmp_path / "whole").glob("*.ckpt"), key=lambda p: int(p.stem.split("=")[1].split("-")[0])
        )
        _, again = run(resumed, "resumed", paths[len(paths) // 2 - 1])
    assert same(dict(module.state_dict()), dict(again.state_dict()))
    assert whole.factors.has_squares
    assert whole.num_collected > 6
    expected, found = whole.state_dict(), resumed.state_dict()
    assert expected["collector"]["schedule"] == found["collector"]["schedule"]
    assert expected["collector"]["record"] == found["collector"]["record"]
    assert expected["fingerprint"] == found["fingerprint"]
    assert expected["collector"]["noise"] == found["collector"]["noise"]
    if "every_n_train_steps" in every:
        # The loader begins its indices anew in the middle of an epoch, and so the examples are others.
        ours, theirs = (state.pop("dynamics") for state in (expected, found))
        assert ours["batches"] == theirs["batches"] == 40
        for state in (expected, found):
            state["checksums"] = {k: v for k, v in state["checksums"].items() if "dynamics" not in k}
    a, b = tensors(expected), tensors(found)
    assert [(k, (a[k] - b[k]).abs().max().item()) for k in a if not torch.equal(a[k], b[k])] == []
    assert same(expected, found)


def test_checkpoint_loads_with_weights_only_and_knows_its_weights(tmp_path) -> None:
    callback, module = InfluenceCallback(every_n_steps=1), Classifier("adam")
    host = fit(module, callback, max_epochs=2)
    callback.extra_state["coarse"] = {"size": 3, "directions": torch.ones(2)}
    host.save_checkpoint(tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]["InfluenceCallback"]
    assert tensors(state)
    loaded = InfluenceCallback()
    loaded.load_state_dict(state)
    assert loaded.factors.fingerprint == fingerprint(module)
    assert same(loaded.extra_state, callback.extra_state)
    assert loaded.record == callback.record
    assert 0 < loaded.record.layers["net.0"].metric < 1  # Adam's, read when the checkpoint was written
    for name, layer in callback.factors.layers.items():
        assert torch.equal(loaded.factors.layers[name].inputs, layer.inputs)


def test_state_of_another_version() -> None:
    state = InfluenceCallback().state_dict()
    state["collector"]["version"] = 99
    reason = "state has version 99, this library reads version 1"
    with pytest.raises(FactorMismatchError, match=reason):
        InfluenceCallback(strict=True).load_state_dict(state)
    with pytest.warns(InfluenceWarning, match=f"an earlier fit is not used: .*{reason}"):
        InfluenceCallback().load_state_dict(state)


def test_second_fit_of_the_same_weights_continues() -> None:
    callback, module = InfluenceCallback(every_n_steps=1), Classifier()
    fit(module, callback, max_epochs=2)
    first = callback.num_collected
    fit(module, callback, max_epochs=2, seed=0)  # a seed of 0 keeps the weights
    assert callback.num_collected == 2 * first
    assert callback.record.steps == 20


@pytest.mark.parametrize("other", ["weights", "shapes"])
def test_fit_of_another_model_starts_again_and_says_so(other) -> None:
    callback = InfluenceCallback(every_n_steps=1)
    fit(Classifier(), callback, max_epochs=2)
    callback.extra_state["coarse"] = torch.ones(1)
    second = Classifier()
    if other == "shapes":
        second.net[3] = torch.nn.Linear(8, 4)
    with pytest.warns(InfluenceWarning, match=r"earlier fit is dropped: the (weights|factors)|dropped: The"):
        fit(second, callback, max_epochs=2)
    assert callback.num_collected == 10
    assert callback.extra_state == {}
    assert callback.factors.layers["net.3"].shape[1] == second.net[3].out_features


def test_two_callbacks_in_one_trainer_keep_their_own_state(tmp_path) -> None:
    first, second = InfluenceCallback(every_n_steps=1), InfluenceCallback(["net.0"], every_n_steps=2)
    with pytest.warns(InfluenceWarning, match="net.3.weight \\(24: not selected\\)"):
        host = fit(Classifier(), first, second, max_epochs=2)
    host.save_checkpoint(tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]
    assert len(state) == 2
    assert list(second.factors.layers) == ["net.0"]
    assert (first.num_collected, second.num_collected) == (10, 5)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # Lightning's own loaders, while pickled
def test_plain_trainer_answers_and_survives_pickling() -> None:
    callback = InfluenceCallback()
    host = fit(Classifier(), callback, max_epochs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, about a class of its own in the pickle
        again = pickle.loads(pickle.dumps(host))
    for name in ("influence", "self_influence"):
        assert callable(getattr(again, name))
        # Bound to the Trainer it hangs on, not to the one it was copied from.
        assert getattr(again, name).args[0] is again
    assert same(again.callbacks[0].state_dict(), callback.state_dict())


def test_trainer_that_has_the_methods_keeps_them() -> None:
    from lightning_influence.api.trainer import InfluenceTrainer

    host = InfluenceTrainer(logger=False, callbacks=[InfluenceCallback()])
    host.callbacks[0].setup(host, Classifier(), "fit")
    assert "influence" not in vars(host)


def test_influence_state_is_kept_until_training_goes_on() -> None:
    callback, module = InfluenceCallback(every_n_steps=1), Classifier()
    assert callback.influence_state.factors is None
    fit(module, callback, max_epochs=1)
    state = callback.influence_state
    assert state.factors.layers is callback.factors.layers
    assert state.record is callback.record
    state.coarse_key = "built"
    assert callback.influence_state.coarse_key == "built"
    fit(module, callback, max_epochs=1, seed=0)
    assert callback.influence_state.coarse_key == ""
