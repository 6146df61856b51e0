"""What the callback cannot collect from: a reason each time, in a warning or an error."""

from __future__ import annotations

import copy
import re
import warnings

import lightning
import numpy as np
import pytest
import torch
from callback_models import Classifier, fit, loader, same
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence.collecting.callback import InfluenceCallback
from lightning_influence.support.errors import (
    InfluenceWarning,
    LossCaptureError,
    UnsupportedModelError,
    UnsupportedTrainerError,
)


def clean(module: nn.Module) -> bool:
    """No hook, no mode is left."""
    return (
        all(not part._forward_hooks for part in module.modules())
        and torch.overrides._len_torch_function_stack() == 0
    )


class OwnLoss(Classifier):
    def training_step(self, batch, batch_idx):
        return (self.net(batch[0]).logsumexp(1) - self.net(batch[0])[:, 0]).mean()


class TwoLosses(Classifier):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + functional.mse_loss(
            self.net(batch[0]), torch.ones(len(batch[0]), 3)
        )


def test_the_sum_of_two_losses_is_collected() -> None:
    callback = InfluenceCallback(every_n_steps=1, strict=True)
    fit(TwoLosses(), callback)
    assert callback.num_collected > 0
    assert callback.factors.layers


@pytest.mark.parametrize(("module_class", "message"), [(OwnLoss, "no loss function was seen")])
def test_loss_that_is_not_found_names_the_hook(module_class, message) -> None:
    module = module_class()
    with pytest.raises(LossCaptureError, match=f"(?s){message}.*influence_loss"):
        fit(module, InfluenceCallback(strict=True))
    assert clean(module)
    with pytest.warns(InfluenceWarning, match=f"(?s)Nothing is collected .*{message}.*Training goes on"):
        fit(module, InfluenceCallback())
    assert clean(module)


def test_hook_serves_where_the_loss_is_not_found() -> None:
    class Hooked(OwnLoss):
        def influence_loss(self, batch):
            labels = torch.zeros_like(batch[1])
            return functional.cross_entropy(self.net(batch[0]), labels, reduction="none")

    callback, module = InfluenceCallback(every_n_steps=2), Hooked()
    fit(module, callback, max_epochs=2)
    assert callback.num_collected == 5
    assert callback.factors.fisher == "mixed"
    assert clean(module)


class Nan(Classifier):
    def training_step(self, batch, batch_idx):
        x = batch[0] * float("nan") if batch_idx == 1 else batch[0]
        return functional.cross_entropy(self.net(x), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)

    def on_before_optimizer_step(self, optimizer) -> None:
        for p in self.parameters():
            p.grad.nan_to_num_()


def test_nan_batch_is_left_out_and_the_layer_named() -> None:
    callback = InfluenceCallback(every_n_steps=1)
    with pytest.warns(InfluenceWarning, match="left out .* loss is nan: the inputs of layer 'net.0' are"):
        fit(Nan(), callback, max_epochs=1)
    assert callback.num_collected == 4
    assert all(torch.isfinite(layer.inputs).all() for layer in callback.factors.layers.values())


def test_lbfgs_is_refused_and_trains_on() -> None:
    callback, module = InfluenceCallback(), Classifier("lbfgs", p=0.0)
    with pytest.warns(InfluenceWarning, match="Nothing is collected .*LBFGS runs the training step several"):
        fit(module, callback, max_epochs=1)
    assert not callback.factors.layers
    assert callback.record is None


class Manual(Classifier):
    def __init__(self, raw: bool = False, times: int = 1) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.raw, self.times = raw, times

    def training_step(self, batch, batch_idx) -> None:
        for _ in range(self.times):
            optimizer = self.optimizers()
            loss = super().training_step(batch, batch_idx)
            optimizer.zero_grad()
            if self.raw:
                loss.backward()
            else:
                self.manual_backward(loss)
            optimizer.step()


def test_manual_optimization_works() -> None:
    callback = InfluenceCallback(every_n_steps=1)
    fit(Manual(), callback, max_epochs=1)
    assert callback.num_collected == 5
    assert callback.record.steps == 5


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Manual(raw=True), "did not call self.manual_backward\\(loss\\)"),
        (Manual(times=2), "ran several backward passes.*influence_loss"),
    ],
)
def test_manual_optimization_gets_a_reason(module, message) -> None:
    callback = InfluenceCallback(every_n_steps=1)
    with pytest.warns(InfluenceWarning, match=message):
        fit(module, callback, max_epochs=1)
    assert clean(module)
    assert not callback.factors.layers


def test_skipped_steps_are_no_error() -> None:
    class Skipping(Classifier):
        def training_step(self, batch, batch_idx):
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

    callback, module = InfluenceCallback(every_n_steps=1), Skipping()
    with warnings.catch_warnings():
        warnings.simplefilter("error", InfluenceWarning)
        fit(module, callback, max_epochs=2)
    assert callback.num_collected == 6
    assert clean(module)


def test_model_without_supported_layers() -> None:
    class Scale(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(6)

        def training_step(self, batch, batch_idx):
            return functional.cross_entropy(self.norm(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    reason = r"A fit collects factors of linear and convolution layers \(.*\), and this model has none"
    with pytest.raises(UnsupportedModelError, match=reason):
        fit(Scale(), InfluenceCallback(strict=True))
    with pytest.warns(InfluenceWarning, match=f"(?s)Nothing is collected .*{reason}"):
        assert fit(Scale(), InfluenceCallback()).state.finished


def test_examples_that_depend_on_each_other() -> None:
    class Coupled(Classifier):
        def training_step(self, batch, batch_idx):
            outputs = self.net(batch[0])
            return functional.cross_entropy(outputs - outputs.mean(0), batch[1])

    reason = r"depends on layer .net\.0. at other examples"
    with pytest.raises(UnsupportedModelError, match=reason):
        fit(Coupled(p=0.0), InfluenceCallback(strict=True))
    with pytest.warns(InfluenceWarning, match=f"Nothing is collected .*{reason}"):
        assert fit(Coupled(p=0.0), InfluenceCallback()).state.finished


def test_rows_that_a_mask_picked_are_nobodys() -> None:
    """As many for each example in one batch are no promise: in another one others' would be counted off."""

    class Masked(Classifier):
        def training_step(self, batch, batch_idx):
            outputs = self.net(batch[0])[:, None].expand(-1, 2, -1)
            mask = torch.tensor([True, False]).expand(len(outputs), 2)
            return functional.cross_entropy(outputs[mask], batch[1])

    reason = "rows that a mask picked"
    with pytest.raises(LossCaptureError, match=reason):
        fit(Masked(p=0.0), InfluenceCallback(strict=True))
    with pytest.warns(InfluenceWarning, match=f"(?s)Nothing is collected .*{reason}"):
        assert fit(Masked(p=0.0), InfluenceCallback()).state.finished


@pytest.mark.parametrize("size", [1, 7])
def test_batches_of_one_and_short_last_batches(size) -> None:
    callback = InfluenceCallback(every_n_steps=1)
    data = loader(15, size)
    fit(Classifier(), callback, data=data, max_epochs=1)
    assert callback.factors.layers["net.0"].examples + callback.factors.layers["net.0"].squares_examples >= 7


def test_validation_is_not_collected() -> None:
    class Validated(Classifier):
        def validation_step(self, batch, batch_idx) -> None:
            functional.cross_entropy(self.net(batch[0]), batch[1])

    callback, module = InfluenceCallback(every_n_steps=1), Validated()
    data = loader()
    module.val_dataloader = lambda: DataLoader(TensorDataset(*data.dataset.tensors), 8)
    fit(module, callback, max_epochs=2)
    assert callback.num_collected == 10


def test_bad_settings() -> None:
    with pytest.raises(
        ValueError, match="fisher='exact'; accepted during fit are 'mixed', 'sampled', 'empirical'"
    ):
        InfluenceCallback(fisher="exact")
    with pytest.raises(ValueError, match="accepted are shares of a step"):
        InfluenceCallback(overhead=0)


@pytest.mark.parametrize(
    ("name", "value", "accepted"),
    [
        ("every_n_steps", 2.5, "integers of at least 1, or None for as many batches as overhead pays for"),
        ("every_n_steps", 0, "integers of at least 1, or None"),
        ("every_n_steps", True, "integers of at least 1, or None"),
        ("every_n_steps", "2", "integers of at least 1, or None"),
        ("seed", -1, "integers of at least 0"),
        ("seed", "a", "integers of at least 0"),
        ("seed", None, "integers of at least 0"),
        ("seed", 0.5, "integers of at least 0"),
        ("overhead", "5%", r"shares of a step in \(0, 1\]"),
        ("overhead", None, r"shares of a step in \(0, 1\]"),
        ("overhead", float("nan"), r"shares of a step in \(0, 1\]"),
        ("overhead", 1.5, r"shares of a step in \(0, 1\]"),
    ],
)
def test_numbers_out_of_range_are_refused_before_the_fit(name, value, accepted) -> None:
    with pytest.raises(ValueError, match=f"Got {name}={re.escape(repr(value))}; accepted are {accepted}"):
        InfluenceCallback(**{name: value})


def test_numbers_of_numpy_are_numbers() -> None:
    settings = {"every_n_steps": np.int64(2), "overhead": np.float32(0.5), "seed": np.uint8(3)}
    callback, plain = InfluenceCallback(**settings), InfluenceCallback(None, "mixed", 2, 0.5, seed=3)
    fit(Classifier(), callback, max_epochs=2)
    fit(Classifier(), plain, max_epochs=2)
    assert same(callback.state_dict(), plain.state_dict())
    assert type(callback.state_dict()["collector"]["schedule"]["every_n_steps"]) is int


@pytest.mark.parametrize(
    ("layers", "hint"),
    [("net.0", r": layers=\['net.0'\]\."), ([0], r"\."), (3, r"\."), (["net.0", None], r"\.")],
)
def test_layers_are_a_list_of_texts(layers, hint) -> None:
    got = re.escape(repr(layers))
    with pytest.raises(TypeError, match=f"Got layers={got}; accepted is a list of names or patterns{hint}"):
        InfluenceCallback(layers=layers)


@pytest.mark.parametrize("manual", [False, True])
def test_steps_that_a_scaler_skips_are_not_recorded(manual) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**26)
    callback, module = InfluenceCallback(every_n_steps=1), Manual() if manual else Classifier()
    start = copy.deepcopy(module.state_dict())
    taken = []

    class Counting(torch.optim.SGD):
        def step(self, closure=None):
            taken.append(self.param_groups[0]["lr"])
            return super().step(closure)

    module.configure_optimizers = lambda: Counting(module.parameters(), 0.05)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    fit(module, callback, seed=0, max_epochs=4, plugins=[plugin])
    assert 0 < len(taken) < 20
    assert callback.record.steps == len(taken)
    assert callback.record.layers["net.0"].rate == pytest.approx(sum(taken))
    assert not same(start, module.state_dict())


def test_steps_without_a_loss_are_not_recorded() -> None:
    class Skipping(Classifier):
        def training_step(self, batch, batch_idx):
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

    callback = InfluenceCallback(every_n_steps=1)
    fit(Skipping(), callback, max_epochs=2)
    assert callback.record.steps == 6


@pytest.mark.parametrize(("factor", "told"), [(1.0, False), (-1.0, True), (3.0, True)])
def test_a_hook_of_another_loss_is_told(factor, told) -> None:
    class Other(Classifier):
        def influence_loss(self, batch):
            return factor * functional.cross_entropy(self.net(batch[0]), batch[1], reduction="none")

    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        fit(Other(), InfluenceCallback(every_n_steps=1), max_epochs=1)
    messages = [str(w.message) for w in record if "leaves out a penalty on purpose" in str(w.message)]
    assert len(messages) == told


def test_strict_raises_where_collecting_would_stop() -> None:
    for module, error, match in [
        (Classifier("lbfgs", p=0.0), UnsupportedTrainerError, "LBFGS"),
        (Manual(raw=True), UnsupportedModelError, "did not call self.manual_backward"),
        (Manual(times=2), UnsupportedModelError, "several backward passes"),
    ]:
        with pytest.raises(error, match=match):
            fit(module, InfluenceCallback(every_n_steps=1, strict=True), max_epochs=1)
        assert clean(module)
    callback = InfluenceCallback(every_n_steps=1, strict=True)
    with pytest.warns(InfluenceWarning, match="left out"):  # a single batch is no reason to stop
        fit(Nan(), callback, max_epochs=1)
    assert callback.num_collected == 4


@pytest.mark.parametrize("size", [4, 8])
def test_the_number_of_examples_is_what_the_loader_put_into_the_batch(size) -> None:
    """A square mask comes first, and the batch says its side."""

    class Masked(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch["x"], batch["y"]), batch_idx)

    def collate(rows):
        x, y = torch.utils.data.default_collate(rows)
        return {"mask": torch.ones(5, 5), "x": x, "y": y}

    data = DataLoader(loader(22).dataset, size, collate_fn=collate)
    callback, plain = InfluenceCallback(every_n_steps=1), InfluenceCallback(every_n_steps=1)
    fit(Masked(p=0.0), callback, data=data, max_epochs=2)
    fit(Classifier(p=0.0), plain, data=DataLoader(loader(22).dataset, size), max_epochs=2)
    assert callback.num_collected == 2 * len(data)
    assert same(callback.state_dict(), plain.state_dict())


def test_a_loss_of_the_callbacks_own_serves_where_the_steps_is_not_found() -> None:
    def squares(module, batch):
        return functional.mse_loss(
            module.net(batch[0]), torch.zeros(len(batch[0]), 3), reduction="none"
        ).mean(1)

    def mean(module, batch):
        return functional.mse_loss(module.net(batch[0]), torch.zeros(len(batch[0]), 3))

    found = []
    for loss in (squares, mean):
        callback = InfluenceCallback(every_n_steps=1, strict=True, loss=loss)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", InfluenceWarning)
            fit(OwnLoss(), callback)
        found.append(callback.factors)
    for name, layer in found[0].layers.items():
        torch.testing.assert_close(layer.covariance_out(), found[1].layers[name].covariance_out())
    with pytest.raises(TypeError, match="Got loss='mse'; accepted is a callable"):
        InfluenceCallback(loss="mse")
