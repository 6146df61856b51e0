"""Checkpoints as Lightning loads them: hooks, strictness, objects that are not unpickled, several in turn."""

from __future__ import annotations

import argparse
import contextlib
import copy
import pathlib
import re

import numpy as np
import pytest
import torch
from influence_cases import quiet
from influence_models import Net, fitted, queries, train, trainer
from torch import nn

from lightning_influence import InfluenceModule, influence
from lightning_influence.running.host.checkpoints import read_checkpoint, remember_weights
from lightning_influence.support.errors import CorruptFileError, InfluenceError, UnsafeCheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:.*logging interval")
QUICK = {"method": "kfac", "damping": 0.1}


class Averaged(Net):
    """Keeps an average of its weights in the checkpoint and takes it up when it is loaded."""

    def on_save_checkpoint(self, checkpoint):
        checkpoint["average"] = {name: t + 1.0 for name, t in checkpoint["state_dict"].items()}

    def on_load_checkpoint(self, checkpoint):
        checkpoint["state_dict"] = checkpoint.pop("average")


class Partial(Net):
    """Leaves a frozen part out of its checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        self.strict_loading = False
        self.frozen = nn.Linear(4, 4).requires_grad_(False)

    def state_dict(self, *args, **kwargs):
        every = super().state_dict(*args, **kwargs)
        return {name: t for name, t in every.items() if not name.startswith("frozen")}


class Late(Net):
    """Makes a part of itself in ``configure_model``."""

    def __init__(self) -> None:
        super().__init__()
        self.head = None

    def configure_model(self):
        if self.head is None:
            self.head = nn.Linear(3, 3)

    def forward(self, x):
        return self.head(self.body(x))


class Counting(Net):
    """Has state that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = {"calls": [0], "mean": torch.zeros(2)}

    def get_extra_state(self):
        return self.seen

    def set_extra_state(self, state):
        self.seen = state


class Holding(Net):
    """Any object as a hyperparameter."""

    def __init__(self, held=None) -> None:
        super().__init__()
        self.save_hyperparameters()


def saved(path, module, *, epochs=1):
    host, _ = fitted(module=module, max_epochs=epochs)
    host.save_checkpoint(path)
    return str(path)


def weights(module):
    return {name: t.detach().clone() for name, t in (*module.named_parameters(), *module.named_buffers())}


# ---------------------------------------------------------------- into a module that exists


@pytest.mark.parametrize("kind", [Averaged, Partial, Late, Counting])
def test_an_instance_is_loaded_as_its_class_is(kind, tmp_path):
    path = saved(tmp_path / "a.ckpt", kind())
    torch.manual_seed(5)
    expected = kind.load_from_checkpoint(path)
    torch.manual_seed(5)
    module = kind()
    found = InfluenceModule.from_checkpoint(path, module)
    assert found.model is module
    torch.testing.assert_close(weights(module), weights(expected), rtol=0, atol=0)
    assert found.state.factors is not None
    by_class = InfluenceModule.from_checkpoint(path, kind)
    with quiet():
        pair = [asked.scores(train(), queries(), **QUICK).scores for asked in (found, by_class)]
    torch.testing.assert_close(*pair)


def test_strict_loading_is_the_modules(tmp_path):
    path = saved(tmp_path / "a.ckpt", Net())
    module = Net()
    module.extra = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match=r"Missing key.*extra\.weight"):
        InfluenceModule.from_checkpoint(path, module)
    module.strict_loading = False
    InfluenceModule.from_checkpoint(path, module)
    torch.testing.assert_close(
        weights(module)["body.0.weight"], read_checkpoint(path)["state_dict"]["body.0.weight"]
    )


def test_a_module_keeps_its_weights_when_loading_fails(tmp_path):
    class Wider(Counting):
        def __init__(self) -> None:
            super().__init__()
            self.body[3] = nn.Linear(5, 4)

    path = saved(tmp_path / "a.ckpt", Counting(), epochs=2)
    module = Wider()
    module.seen["calls"] = [7]
    before = weights(module)
    with pytest.raises(RuntimeError, match=r"size mismatch for body\.3\.weight"):
        InfluenceModule.from_checkpoint(path, module)
    torch.testing.assert_close(weights(module), before, rtol=0, atol=0)
    assert module.seen["calls"] == [7]


def test_what_only_a_class_takes_is_refused(tmp_path):
    path = saved(tmp_path / "a.ckpt", Net())
    assert InfluenceModule.from_checkpoint(path, Net, strict=False, width=5).model.hparams.width == 5
    with pytest.raises(
        TypeError, match="Got strict, width with a module that exists; only load_from_checkpoint"
    ):
        InfluenceModule.from_checkpoint(path, Net(), strict=False, width=5)
    with pytest.raises(
        TypeError, match=r"Got Linear; accepted are classes of lightning\.pytorch\.LightningModule"
    ):
        InfluenceModule.from_checkpoint(path, nn.Linear)
    with pytest.raises(TypeError, match=r"Expected a LightningModule of .* got str"):
        InfluenceModule.from_checkpoint(path, "Net")


# ---------------------------------------------------------------- the certificate


@pytest.mark.parametrize("model", [Net, Net()], ids=["class", "instance"])
def test_answers_name_the_checkpoint(model, tmp_path):
    path = tmp_path / "a.ckpt"
    saved(path, Net())
    asked = InfluenceModule.from_checkpoint(path, model)
    answers = [
        asked.scores(train(), queries(), **QUICK).diagnostics,
        asked.self_influence(train(), **QUICK).diagnostics,
        asked.ihvp(train(), queries(), **QUICK)[1],
    ]
    assert [answer.checkpoint for answer in answers] == [str(path)] * 3
    file = asked.scores(train(), queries(), **QUICK).save(tmp_path / "a.safetensors")
    assert InfluenceModule(asked).scores(train(), queries(), **QUICK).diagnostics.checkpoint == str(path)
    assert type(asked.scores(train(), queries(), **QUICK)).load(file).diagnostics.checkpoint == str(path)


def test_other_weights_are_not_called_the_checkpoint(tmp_path):
    asked = InfluenceModule.from_checkpoint(saved(tmp_path / "a.ckpt", Net()), Net)
    with torch.no_grad():
        asked.model.body[0].weight[0, 0] += 0.01
    with quiet():
        found = asked.scores(train(), queries(), **QUICK)
    assert found.diagnostics.checkpoint is None
    assert InfluenceModule(Net()).scores(train(), queries(), **QUICK).diagnostics.checkpoint is None


# ---------------------------------------------------------------- objects that are not unpickled

SCALAR = f"{np.float64(0.1).__reduce__()[0].__module__}.scalar"  # numpy.core before version 2
OBJECTS = {
    f"{type(pathlib.Path()).__module__}.{type(pathlib.Path()).__name__}": pathlib.Path("/data"),  # by version
    SCALAR: np.float64(0.1),
    "argparse.Namespace": argparse.Namespace(lr=0.1),
    "test_checkpoints.Late": Late,
}


def asking(path, folder):
    """Every way to ask of a checkpoint."""
    host = trainer(default_root_dir=folder)
    return {
        "class": lambda: InfluenceModule.from_checkpoint(path, Holding),
        "instance": lambda: InfluenceModule.from_checkpoint(path, Holding()),
        "influence": lambda: host.influence(Holding(), train(), queries(), ckpt_path=path, **QUICK),
        "several": lambda: host.influence(Holding(), train(), queries(), ckpt_path=[path], **QUICK),
        "self_influence": lambda: host.self_influence(Holding(), train(), ckpt_path=path, **QUICK),
        "forget": lambda: host.forget([0], Holding(), train(), ckpt_path=path),
    }


@pytest.mark.parametrize("name", OBJECTS)
def test_objects_are_told_from_damage(name, tmp_path):
    path = saved(tmp_path / "a.ckpt", Holding(OBJECTS[name]))
    for way, ask in asking(path, tmp_path).items():
        with pytest.raises(UnsafeCheckpointError) as caught:
            ask()
        text = str(caught.value)
        assert isinstance(caught.value, InfluenceError), way
        assert not isinstance(caught.value, CorruptFileError), way
        for part in (
            f"'{path}' holds objects other than tensors and plain values: ",
            name,
            "not unpickled, which could run code",
            "torch.serialization.add_safe_globals([",
            "torch.serialization.safe_globals([",
            "Model.load_from_checkpoint(path, weights_only=False)",
            "InfluenceModule(model)",
            "ckpt_path=None",
        ):
            assert part in text, (way, part)


@contextlib.contextmanager
def allowing(types):
    """As ``torch.serialization.safe_globals``, which torch 2.4 has not."""
    before = list(torch.serialization.get_safe_globals())
    torch.serialization.add_safe_globals(types)
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def test_the_ways_out_work(tmp_path):
    path = saved(tmp_path / "a.ckpt", Holding(OBJECTS["argparse.Namespace"]))
    with allowing([argparse.Namespace]):
        for way, ask in asking(path, tmp_path).items():
            if way != "forget":
                with quiet():
                    ask()
    model = Holding.load_from_checkpoint(path, weights_only=False)
    with quiet():
        alone = InfluenceModule(model).scores(train(), queries(), fisher="exact", **QUICK)
        found = influence(trainer(), model, train(), queries(), fisher="exact", **QUICK)
    torch.testing.assert_close(alone.scores, found.scores)


def test_all_objects_are_named_until_none_is_left(tmp_path):
    objects, known = [argparse.Namespace(lr=0.1)], {"argparse.Namespace": argparse.Namespace}
    if hasattr(np, "dtypes"):  # NumPy 1.24 has no classes of dtypes to allow
        objects.append(np.float64(0.1))
        known |= {
            "numpy.dtype": np.dtype,
            SCALAR: np.float64(0.1).__reduce__()[0],
            "numpy.dtypes.Float64DType": np.dtypes.Float64DType,
        }
    path = saved(tmp_path / "a.ckpt", Holding(objects))
    allowed = []
    for _ in range(3):
        try:
            with allowing(allowed):
                checkpoint = read_checkpoint(path)
            break
        except UnsafeCheckpointError as error:
            [names] = re.findall(r"add_safe_globals\(\[(.*?)\]\)", str(error))
            allowed += [known[name] for name in names.split(", ")]
    assert checkpoint["hyper_parameters"]["held"] == objects
    assert len(allowed) == len(known)


def test_damage_is_still_called_damage(tmp_path):
    content = pathlib.Path(saved(tmp_path / "a.ckpt", Net())).read_bytes()
    told = "cannot be .* truncated or damaged .*Write it again"
    for number, damaged in enumerate((content[:-100], content[:50], b"", b"text\n", content[1000:])):
        path = tmp_path / f"{number}.ckpt"
        path.write_bytes(damaged)
        with pytest.raises(CorruptFileError, match=rf"{number}\.ckpt' {told}") as caught:
            InfluenceModule.from_checkpoint(path, Net)
        assert "weights_only` set to `False`" not in str(caught.value)
        with pytest.raises(CorruptFileError, match=rf"{number}\.ckpt' {told}"):
            trainer().influence(Net(), train(), queries(), ckpt_path=path)
    with pytest.raises(IsADirectoryError):
        InfluenceModule.from_checkpoint(tmp_path, Net)


def test_weights_alone_are_no_checkpoint_for_a_trainer_either(tmp_path):
    torch.save(Net().state_dict(), tmp_path / "a.pt")
    with pytest.raises(CorruptFileError, match=r"a\.pt' is no Lightning checkpoint: it has no 'state_dict'"):
        trainer().influence(Net(), train(), queries(), ckpt_path=tmp_path / "a.pt")
    with pytest.raises(FileNotFoundError):
        trainer().influence(Net(), train(), queries(), ckpt_path=tmp_path / "none.pt")


def test_errors_of_the_users_own_are_left_alone(tmp_path):
    import pickle

    class Data(Net):
        def setup(self, stage):
            raise pickle.UnpicklingError("mine")

    path = saved(tmp_path / "a.ckpt", Net())
    with pytest.raises(pickle.UnpicklingError, match="mine"):
        trainer().influence(Data(), train(), queries(), ckpt_path=path)


def test_the_users_way_to_read_checkpoints_is_used_and_put_back(tmp_path):
    from lightning.pytorch.plugins.io import TorchCheckpointIO

    class Reading(TorchCheckpointIO):
        read = 0

        def load_checkpoint(self, *args, **kwargs):
            self.read += 1
            return super().load_checkpoint(*args, **kwargs)

    path, plugin = saved(tmp_path / "a.ckpt", Net()), Reading()
    host = trainer(plugins=[plugin])
    with quiet():
        host.influence(Net(), train(), queries(), ckpt_path=path, **QUICK)
    assert plugin.read == 1
    assert host.strategy.checkpoint_io is plugin


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    saved(tmp_path / "a.ckpt", Net())
    for model in (Net, Net()):
        assert InfluenceModule.from_checkpoint("~/a.ckpt", model).state.factors is not None


# ---------------------------------------------------------------- several in turn


@pytest.mark.parametrize("kind", [Counting, Partial, Late, Averaged])
def test_several_checkpoints_leave_the_module_as_it_was(kind, tmp_path):
    done = kind()
    if kind is Counting:
        done.seen["calls"] = [3]
    paths = [saved(tmp_path / f"{number}.ckpt", done) for number in range(2)]
    module = kind()
    before, state = weights(module), copy.deepcopy(getattr(module, "seen", None))
    with quiet():
        found = trainer().influence(module, train(), queries(), ckpt_path=paths, **QUICK)
        parts = [trainer().influence(kind(), train(), queries(), ckpt_path=path, **QUICK) for path in paths]
    after = {name: t for name, t in weights(module).items() if name in before}  # `Late` has made its head
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    if state is not None:
        assert module.seen["calls"] == state["calls"] == [0]
    if kind is not Partial:  # whose frozen part every instance draws anew
        torch.testing.assert_close(found.scores, torch.stack([part.scores for part in parts]).mean(dim=0))


def test_paths_of_any_kind_and_in_any_iterable(tmp_path):
    paths = [pathlib.Path(saved(tmp_path / f"{number}.ckpt", Net())) for number in range(2)]
    with quiet():
        listed = trainer().influence(Net(), train(), queries(), ckpt_path=paths, **QUICK)
        drawn = trainer().influence(Net(), train(), queries(), ckpt_path=(p for p in paths), **QUICK)
    torch.testing.assert_close(listed.scores, drawn.scores)
    assert listed.diagnostics.checkpoint == ", ".join(map(str, paths))


def test_held_weights_tells_an_entry_from_a_parameter_of_its_name():
    class Shadow(nn.Module):
        """Writes its average under the names of its weights."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3))
            self.average = torch.ones(3)

        def state_dict(self, *args, **kwargs):
            return {"weight": self.average}

        def load_state_dict(self, state, strict=True):
            self.average.copy_(state["weight"])

    module = Shadow()
    put_back = remember_weights(module)
    with torch.no_grad():
        module.weight.fill_(5.0)
        module.average.fill_(6.0)
    put_back()
    assert module.weight.tolist() == [0.0] * 3
    assert module.average.tolist() == [1.0] * 3
