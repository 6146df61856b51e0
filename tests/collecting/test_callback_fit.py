"""The callback during fit: what it sums, what it leaves alone, and that it always leaves usable factors."""

from __future__ import annotations

import copy

import lightning
import pytest
import torch
from callback_models import Classifier, fit, loader, same
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset

from lightning_influence.collecting.callback import InfluenceCallback
from lightning_influence.model.losses.draws import draw_generator
from lightning_influence.support.errors import InfluenceWarning


class Recording(lightning.Callback):
    """Keeps the batches and the weights they met."""

    def __init__(self) -> None:
        self.seen: list = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.seen.append((batch, copy.deepcopy(pl_module.net)))


def seed_of(fisher: str, logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """What a backward pass starts from: the gradient at drawn labels, or columns of random signs."""
    p = logits.softmax(-1)
    if fisher == "sampled":
        uniform = torch.rand(len(p), 1, dtype=p.dtype, generator=generator)
        return p - functional.one_hot((p.cumsum(-1) <= uniform).sum(-1), p.shape[-1])
    numbers = torch.randint(0, 256, (-(-p.numel() // 8),), generator=generator)
    bits = torch.stack([(numbers >> place) & 1 for place in range(8)], 1).flatten()[: p.numel()]
    rows = p.sqrt() * (2.0 * bits - 1.0).view(p.shape)
    return rows - p * rows.sum(-1, keepdim=True)


@pytest.mark.grid
@pytest.mark.parametrize("fisher", ["mixed", "sampled"])
@pytest.mark.parametrize(
    ("reduction", "accumulate"), [("mean", 1), ("sum", 1), ("mean", 3)], ids=["mean", "sum", "accumulated"]
)
def test_sums_equal_those_recomputed_from_the_same_batches_and_draws(reduction, accumulate, fisher) -> None:
    callback, recording = InfluenceCallback(fisher=fisher, every_n_steps=1, seed=5), Recording()
    module = Classifier(reduction=reduction, p=0.0).double()
    fit(
        module,
        recording,
        callback,
        data=loader(44, 8, torch.float64),
        max_epochs=4,
        accumulate_grad_batches=accumulate,
    )
    factors, total = callback.factors, len(recording.seen)
    assert callback.num_collected == total == 24
    # The last window is as short as windows are; its first half is for covariances, the rest for squares.
    first, middle = total - 8, total - 5
    expected = {name: [0.0, 0.0, 0.0] for name in ("net.0", "net.3")}
    counts = [0, 0]
    for number in range(first, total):
        (x, _), net = recording.seen[number]
        hidden = net[0](x)
        logits = net[3](hidden.relu())
        d_hidden, d_logits = torch.autograd.grad(
            logits, [hidden, logits], seed_of(fisher, logits.detach(), draw_generator(5, number))
        )
        kind = int(number >= middle)
        counts[kind] += len(x)
        one = torch.ones(len(x), 1, dtype=x.dtype)
        for name, inputs, outputs in (("net.0", x, d_hidden), ("net.3", hidden.relu(), d_logits)):
            abar = torch.cat([inputs, one], 1).detach()
            if kind == 0:
                expected[name][0] += abar.T @ abar
                expected[name][1] += outputs.T @ outputs
            else:
                basis = factors.layers[name].basis
                each = torch.einsum("bo,bi->boi", outputs @ basis.q_out[0], abar @ basis.q_in[0])
                expected[name][2] += each.square().sum(0)
    for name, layer in factors.layers.items():
        assert [layer.examples, layer.squares_examples] == counts
        for got, want in zip((layer.inputs, layer.outputs, layer.squares), expected[name], strict=True):
            torch.testing.assert_close(got[0], want, rtol=1e-11, atol=1e-12)
    assert callback.record.loss_scale == (1.0 if reduction == "mean" else pytest.approx(44 / 6))


@pytest.mark.grid
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("hook", [False, True])
def test_training_is_the_same_to_the_last_bit(precision, hook) -> None:
    class WithNorm(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net.insert(1, nn.BatchNorm1d(8))

    class Hooked(WithNorm):
        def influence_loss(self, batch):
            self.log("unwanted", 1.0)
            return functional.cross_entropy(self.net(batch[0]), batch[1], reduction="none")

    module_class = Hooked if hook else WithNorm
    options = {"precision": precision, "accumulate_grad_batches": 2}
    with_callback, callback = module_class(), InfluenceCallback(every_n_steps=2)
    with pytest.warns(InfluenceWarning, match="BatchNorm in training mode \\(net.1\\)"):
        host = fit(with_callback, callback, **options)
    plain = module_class()
    fit(plain, **options)
    assert callback.num_collected == 10
    assert same(dict(with_callback.state_dict()), dict(plain.state_dict()))
    assert "unwanted" not in host.callback_metrics


class Stream(IterableDataset):
    """Examples in order, without a length or indices."""

    def __init__(self, dataset) -> None:
        self.dataset = dataset

    def __iter__(self):
        return iter([self.dataset[index] for index in range(len(self.dataset))])


def test_a_stream_is_collected_as_its_dataset_is() -> None:
    rows = loader(40).dataset
    callbacks = []
    for data in (DataLoader(rows, 8), DataLoader(Stream(rows), 8)):
        callbacks.append(InfluenceCallback(every_n_steps=1, strict=True))
        fit(Classifier(p=0.0), callbacks[-1], data=data)
    whole, streamed = callbacks
    assert whole.num_collected == streamed.num_collected == 20
    # Which examples of a batch enter the sums follows from indices, which a stream has none of.
    for name, layer in whole.factors.layers.items():
        found = streamed.factors.layers[name]
        assert (found.examples, found.positions) == (layer.examples, layer.positions)
        assert 0.5 < float(found.inputs.norm() / layer.inputs.norm()) < 2


def test_two_runs_give_the_same_state_to_the_last_bit() -> None:
    states = []
    for _ in range(2):
        callback = InfluenceCallback(overhead=1.0)
        fit(Classifier("adamw"), callback, max_epochs=20)
        states.append(callback.state_dict())
    assert callback.factors.has_squares
    assert same(*states)


def check_usable(factors) -> None:
    assert list(factors.layers) == ["net.0", "net.3"]
    for layer in factors.layers.values():
        assert layer.examples >= 8
        assert torch.isfinite(layer.inputs).all()
        assert layer.outputs.diagonal(dim1=-2, dim2=-1).sum() > 0
        if factors.has_squares:
            assert layer.squares.min() >= 0
            assert layer.squares_examples >= 8


class CheckEveryStep(lightning.Callback):
    """Looks at the factors after every batch, as if training ended there; stops it at a given one."""

    def __init__(self, collector: InfluenceCallback, stop: int | None = None) -> None:
        self.collector, self.stop = collector, stop
        self.complete: list[bool] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        check_usable(self.collector.factors)
        self.complete.append(self.collector.factors.has_squares)
        trainer.should_stop = len(self.complete) == self.stop


def test_usable_factors_after_every_step() -> None:
    callback = InfluenceCallback(overhead=1.0)
    check = CheckEveryStep(callback)
    fit(Classifier(), callback, check, max_epochs=20)
    # Most of the budget is saved for the last window; once it was complete there are always eigenvalues.
    assert len(check.complete) == 100
    assert check.complete == sorted(check.complete)
    assert check.complete[-1]


@pytest.mark.parametrize("stop", [1, 2, 23])
def test_usable_factors_after_an_early_stop(stop) -> None:
    callback, module = InfluenceCallback(overhead=0.8), Classifier()
    check = CheckEveryStep(callback, stop)
    fit(module, callback, check, max_epochs=8)
    assert len(check.complete) == stop
    check_usable(callback.factors)
    assert callback.factors.origin == "fit"
    assert set(callback.factors.fingerprint) == {name for name, _ in module.named_parameters()}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_behind_after_an_error_inside_the_step(error) -> None:
    class Failing(Classifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if batch_idx == 2:
                raise error("inside the step")
            return loss

    module, callback = Failing(), InfluenceCallback(every_n_steps=1)
    with pytest.raises((error, SystemExit)):
        fit(module, callback)
    assert all(not part._forward_hooks for part in module.modules())
    assert torch.overrides._len_torch_function_stack() == 0
    assert callback.num_collected == 2
    assert callback.factors.layers


def test_figures_are_logged() -> None:
    class Memory(lightning.pytorch.loggers.logger.DummyLogger):
        def __init__(self) -> None:
            super().__init__()
            self.rows: list = []

        def log_metrics(self, metrics, step=None) -> None:
            self.rows.append((step, metrics))

    memory, callback = Memory(), InfluenceCallback(every_n_steps=1)
    fit(Classifier(), callback, logger=memory, log_every_n_steps=4, max_epochs=8)
    rows = [(step, m) for step, m in memory.rows if any(key.startswith("influence/") for key in m)]
    assert len(rows) == 10
    last = rows[-1][1]
    names = {"trace", "top_eigenvalue", "stable_rank", "grad_norm", "grad_norm/net.0"}
    names |= {"effective_learning_rate", "weight_decay", "examples", "collected_batches"}
    assert {f"influence/{name}" for name in names} <= set(last)
    assert last["influence/effective_learning_rate"] == pytest.approx(0.5)
    layers = [last[f"influence/grad_norm/net.{i}"] for i in (0, 3)]
    assert last["influence/grad_norm"] == pytest.approx(sum(n * n for n in layers) ** 0.5, rel=1e-5)
    assert 1 <= last["influence/stable_rank"] <= 83
    quiet = Memory()
    fit(Classifier(), InfluenceCallback(log_statistics=False), logger=quiet)
    assert not [m for _, m in quiet.rows if any(key.startswith("influence/") for key in m)]
