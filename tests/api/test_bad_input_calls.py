"""What is refused, with which words, and that the user's Trainer and module are as before."""

from __future__ import annotations

import random
import re
import warnings

import numpy as np
import pytest
import torch
from influence_models import Net, dataset, fitted, queries, train, trainer
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_influence import InfluenceCallback, InfluenceModule, Labels
from lightning_influence.methods.options import Options
from lightning_influence.results.attributions import Attributions
from lightning_influence.support.errors import (
    CorruptFileError,
    InfluenceWarning,
    NonFiniteError,
    UnsupportedDataError,
    UnsupportedModelError,
    UnsupportedTrainerError,
)


def state(host, module):
    """Everything that a call could disturb, in values that compare."""
    return {
        "weights": {name: t.clone() for name, t in module.state_dict().items()},
        "requires_grad": {name: p.requires_grad for name, p in module.named_parameters()},
        "grads": {name: p.grad for name, p in module.named_parameters()},
        "modes": {name: m.training for name, m in module.named_modules()},
        "hooks": [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for m in module.modules()
        ],
        "vars": {name: id(value) for name, value in vars(module).items()},
        "callbacks": [id(c) for c in host.callbacks],
        "module": id(host.lightning_module),
        "loggers": [id(logger) for logger in host.loggers],
        "loops": (id(host.predict_loop), id(host.fit_loop), host.limit_predict_batches, host.state.fn),
        "steps": (host.global_step, host.current_epoch),
        "rng": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1],
    }


def assert_same(before, after, path="") -> None:
    assert type(before) is type(after), path
    if isinstance(before, dict):
        assert before.keys() == after.keys(), path
        for key in before:
            assert_same(before[key], after[key], f"{path}/{key}")
    elif isinstance(before, torch.Tensor | np.ndarray):
        assert (before == after).all(), path
    else:
        assert before == after, path


class Untouched:
    """A fitted Trainer with odd flags; leaving the block compares all with how it was."""

    def __init__(self, module=None, **options) -> None:
        self.host, self.module = fitted(module=module, **options)
        self.module.train()
        next(iter(self.module.children())).eval()
        self.kept = self.host.callbacks[0].factors.state_dict()

    def __enter__(self):
        self.before = state(self.host, self.module)
        return self

    def __exit__(self, *error) -> None:
        if error[0] is None:
            assert_same(self.before, state(self.host, self.module))
            assert_same(self.kept, self.host.callbacks[0].factors.state_dict())

    def ask(self, loader=None, asked=None, **options):
        return self.host.influence(
            train_dataloaders=loader,
            query_dataloaders=queries() if asked is None else asked,
            log=False,
            **options,
        )


SETTINGS = {
    "method": (
        "ek-fac",
        "Got method='ek-fac'; accepted are astra, auto, block_ggn, cg, diagonal, ekfac, exact, hessian",
    ),
    "blocks": ("row", "Got blocks='row'; accepted are 'layer', 'tensor'"),
    "negative_curvature": (
        "no",
        "Got negative_curvature='no'; accepted are 'absolute', 'clip', 'keep', 'ref",
    ),
    "damping": ("more", "Got damping='more'; accepted are 'auto', 'heuristic' or a finite number"),
    "measurement": ("accuracy", "Got measurement='accuracy'; accepted are 'loss', 'margin', 'logit', 'hook'"),
    "fisher": ("true", "Got fisher='true'; accepted are 'mixed', 'sampled', 'exact', 'empirical'"),
    "memory_budget": (0, "Got memory_budget=0; accepted are integers of at least 1"),
    "max_steps": (-1, "Got max_steps=-1; accepted are integers of at least 0"),
    "curvature_examples": (0, "Got curvature_examples=0; accepted are integers of at least 1"),
    "seed": (-3, "Got seed=-3; accepted are integers of at least 0"),
    "tolerance": (float("nan"), "Got tolerance=nan; accepted are finite numbers of at least 0"),
    "low_rank_tolerance": (1.0, "Got low_rank_tolerance=1.0; accepted are numbers below 1 of at least 0"),
    "top_k": (0, "Got top_k=0; accepted are positive integers"),
}


def test_settings_out_of_range():
    with Untouched() as user:
        for name, (value, message) in SETTINGS.items():
            with pytest.raises(ValueError, match=re.escape(message)):
                user.ask(**{name: value})
        for damping in (-0.1, float("inf"), float("nan"), True, None):
            with pytest.raises(
                ValueError, match=r"Got damping=.*; accepted are 'auto', 'heuristic' or a finite"
            ):
                Options(damping=damping)
        for top_k in (2.5, True, "3"):
            with pytest.raises(ValueError, match="accepted are positive integers, or None for all scores"):
                user.ask(top_k=top_k)
        with pytest.raises(ValueError, match=r"Got memory_budget=1000000000.0; accepted are integers"):
            user.ask(memory_budget=1e9)
        with pytest.raises(TypeError, match=r"accepted is a list of names or patterns: layers=\['body.0'\]"):
            user.ask(layers="body.0")
        with pytest.raises(
            UnsupportedModelError, match=r"layers='head.\*' selects no supported, trainable layer"
        ):
            user.ask(layers=["head.*"])
        with pytest.raises(UnsupportedModelError, match=r"layers=\[\] selects nothing"):
            user.ask(layers=[])
        with pytest.raises(TypeError, match=r"Got layers=\[1\]; accepted is a list of names"):
            user.ask(layers=[1])
        with pytest.raises(TypeError, match=r"labels of type list; accepted are Labels\(train="):
            user.ask(labels=["zero", "one"])
        with pytest.raises(TypeError, match="labels of type dict"):
            user.host.self_influence(labels={}, log=False)
        with pytest.raises(TypeError, match="type list; self-influence takes one checkpoint"):
            user.host.self_influence(ckpt_path=["a", "b"], log=False)
        with pytest.raises(ValueError, match=r"Net defines no `influence_measurement"):
            user.ask(measurement="hook")
        with pytest.raises(TypeError, match="Got a measurement of type int"):
            user.ask(measurement=3)
        with pytest.raises(ValueError, match=r"ModelCheckpoint. is not configured"):
            user.ask(ckpt_path="best")


def some(items):
    """A collate function that drops examples."""
    return torch.utils.data.default_collate(items[: max(1, len(items) - 1)])


def nan_at(position: int, count: int = 22) -> DataLoader:
    x, y = dataset(count).tensors
    x = x.clone()
    x[position] = float("nan")
    return DataLoader(TensorDataset(x, y), 5)


def test_data_that_cannot_be_used():
    empty = DataLoader(Subset(dataset(), []), 3)
    with Untouched() as user:
        for loader, asked, message in (
            (empty, None, "The loader over Subset has no examples"),
            (None, empty, "The loader over Subset has no examples"),
            ([], None, "The list of loaders is empty"),
            (None, [], "The list of loaders is empty"),
            ([train(), train()], None, "Got 2 training loaders"),
            (train(collate_fn=some), None, "A batch made of 5 examples has 4: its collate_fn"),
            (None, DataLoader(dataset(4), 4, collate_fn=some), "A batch made of 4 examples has 3"),
        ):
            for method in ("auto", "kfac"):
                with pytest.raises(UnsupportedDataError, match=re.escape(message)):
                    user.ask(loader, asked, method=method, factors="refit")
        with pytest.raises(TypeError, match="Expected a DataLoader over a map-style dataset"):
            user.ask(3)
        with pytest.raises(TypeError, match=r"tuple of 2 tensors, which looks like one batch.*\[batch\]"):
            user.ask(asked=dataset(4).tensors)


@pytest.mark.parametrize(
    "method", ["identity", "diagonal", "kfac", "ekfac", "block_ggn", "exact", "hessian", "auto"]
)
def test_values_that_are_not_finite(method):
    with Untouched() as user:
        for position in (0, 17):  # in the first batch, and in a later one
            with pytest.raises(
                NonFiniteError, match=r"inputs of layer 'body.0' are the first that are not finite"
            ):
                user.ask(nan_at(position), method=method, factors="refit", damping=0.1)
        with pytest.raises(
            NonFiniteError, match=r"the inputs of layer 'body.0' are the first that are not finite"
        ):
            user.ask(asked=nan_at(1, 4), method=method, damping=0.1)
        assert user.ask(method=method, damping=0.1).scores.isfinite().all()
    module = InfluenceModule(Net())
    with pytest.raises(NonFiniteError, match=r"Nothing of this batch was stored"):
        module.fit_factors(nan_at(17))
    assert module.state.factors is None


class Frozen(Net):
    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)


class Manual(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Hooked(Manual):
    def influence_loss(self, batch):
        return functional.cross_entropy(self(batch[0]), batch[1], reduction="none")


class Coupled(Net):
    def forward(self, x):
        return self.body(x) - self.body(x).mean(dim=0)


class RootOfTheBatch(Net):
    def training_step(self, batch, batch_idx):
        return (self(batch[0]) - 1).square().mean().sqrt()


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        (Frozen, UnsupportedModelError, "no trainable parameter"),
        (Manual, UnsupportedModelError, "optimizes manually, so its `training_step` cannot be run"),
        (Coupled, UnsupportedModelError, "loss of one example depends on layer 'body.*' at other examples"),
        (RootOfTheBatch, UnsupportedModelError, "depends on the others.*`loss=`"),
    ],
)
def test_models_that_cannot_be_used(kind, error, message):
    host, module = trainer(), kind()
    host.strategy.connect(module)
    before = state(host, module)
    with pytest.raises(error, match=message):
        host.influence(module, train(), queries())
    with pytest.raises(error, match=message):
        host.self_influence(module, train())
    assert_same(before, state(host, module))


def test_manual_optimization_with_the_hook_and_lbfgs_work():
    assert InfluenceModule(Hooked()).scores(train(), queries(), damping=0.1).scores.isfinite().all()

    class Closed(Net):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), max_iter=2)

    with pytest.warns(InfluenceWarning, match="LBFGS runs the training step several times"):
        host, _ = fitted(module=Closed(), max_epochs=1)
    assert "from the pass" in host.influence(query_dataloaders=queries()).diagnostics.extra["factors"]


def test_batchnorm_in_train_mode_is_noted_and_refit_is_offered():
    module = Net()
    module.body.insert(1, nn.BatchNorm1d(5))
    with pytest.warns(InfluenceWarning, match=r"BatchNorm in training mode .*factors='refit'"):
        host, _ = fitted(module=module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InfluenceWarning)
        found = host.influence(query_dataloaders=queries(), factors="refit", method="kfac")
    assert "from the pass" in found.diagnostics.extra["factors"]


def test_trainers_that_cannot_be_used():
    host, module = trainer(strategy="ddp_spawn", devices=2), Net()
    with pytest.raises(UnsupportedTrainerError, match="starts its processes with spawn or fork"):
        host.influence(module, train(), queries())
    with (
        Untouched() as user,
        torch.inference_mode(),
        pytest.raises(UnsupportedTrainerError, match="inference_mode"),
    ):
        user.ask()
    with pytest.raises(TypeError, match="No model: pass one"):
        trainer().influence(None, train(), queries())


def test_limits_do_not_truncate():
    with Untouched(limit_predict_batches=1) as user:
        with pytest.warns(
            InfluenceWarning, match="limit_predict_batches limits prediction to 1 of the batches"
        ):
            found = user.ask()
        assert len(found.train_indices) == 22


@pytest.mark.parametrize("limits", [{"limit_train_batches": 2}, {"overfit_batches": 1}])
def test_fits_on_part_of_the_data_are_pointed_out(limits):
    [(name, value)] = limits.items()
    with (
        Untouched(**limits) as user,
        pytest.warns(InfluenceWarning, match=f"{name}={value} lets a fit see part"),
    ):
        user.ask(train())


def test_no_damping_of_a_singular_curvature():
    """A softmax has a direction without curvature, whose rounding errors must not be divided by."""
    torch.manual_seed(0)
    module = InfluenceModule(Net().double())
    data = [tuple(t.double() if t.is_floating_point() else t for t in dataset().tensors)]
    for method in ("ekfac", "kfac"):
        tiny, none = (
            module.scores(
                data, data, method=method, damping=damping, fisher="exact", low_rank_tolerance=0.0
            ).scores
            for damping in (1e-11, 0.0)
        )
        torch.testing.assert_close(none, tiny, rtol=1e-5, atol=1e-7)
    with pytest.raises(NonFiniteError, match="singular at damping 0"):
        module.scores(data, data, method="exact", damping=0.0)
    exact = module.scores(data, data, method="exact", damping=1e-14).scores
    solved = module.scores(data, data, damping=0.0, fisher="exact", tolerance=1e-8, max_steps=30).scores
    torch.testing.assert_close(solved, exact, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("size", [1, 21, 4])
def test_batches_of_one_and_short_last_ones(size):
    with Untouched() as user:
        whole = user.ask(train(batch_size=22), method="ekfac", damping=0.1)
        torch.testing.assert_close(
            user.ask(train(batch_size=size), method="ekfac", damping=0.1).scores, whole.scores
        )
        one = user.ask(asked=DataLoader(Subset(dataset(4, seed=1), [2])), method="ekfac", damping=0.1)
        torch.testing.assert_close(one.scores[0], whole.scores[2])


def test_labels_without_entries():
    with Untouched() as user:
        found = user.ask()
        table = repr(
            found.top(22, labels=Labels(train=["first text"]))
        )  # an index without entry gets no text
        assert "first" in table
        assert "21" in table


def test_damaged_files(tmp_path):
    with Untouched() as user:
        found = user.ask()
        file = found.save(tmp_path / "a.safetensors")
        user.host.save_checkpoint(tmp_path / "a.ckpt")
        for path in (file, tmp_path / "a.ckpt"):
            content = path.read_bytes()
            path.write_bytes(content[: len(content) // 2])
        with pytest.raises(CorruptFileError, match=r"a.safetensors"):
            Attributions.load(file)
        with pytest.raises(CorruptFileError, match=r"a.ckpt' cannot be read as a Lightning checkpoint"):
            InfluenceModule.from_checkpoint(tmp_path / "a.ckpt", Net)
        torch.save({"weights": torch.ones(2)}, tmp_path / "b.ckpt")
        with pytest.raises(CorruptFileError, match="is no Lightning checkpoint: it has no 'state_dict'"):
            InfluenceModule.from_checkpoint(tmp_path / "b.ckpt", Net)
        with pytest.raises(FileNotFoundError):
            InfluenceModule.from_checkpoint(tmp_path / "c.ckpt", Net)


def test_a_checkpoint_of_another_model(tmp_path):
    host = trainer(InfluenceCallback())
    host.fit(Net(width=7), train())
    host.save_checkpoint(tmp_path / "other.ckpt")
    with Untouched() as user, pytest.raises(RuntimeError, match=r"size mismatch for body.0.weight"):
        user.ask(ckpt_path=str(tmp_path / "other.ckpt"))
