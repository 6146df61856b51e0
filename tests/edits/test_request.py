"""What an edit refuses or warns of, and with which words; the module is as before each time."""

import warnings

import pytest
import torch
from edit_models import asked, blobs, of_class, quiet, train
from influence_models import Net
from models import CASES, lightning_module, loader
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceModule
from lightning_influence.edits import directions
from lightning_influence.edits.directions import register_direction
from lightning_influence.edits.request import EditOptions
from lightning_influence.edits.rules import SelectionRule
from lightning_influence.linalg.normal_equations import SingularSubsetError, SubsetSolution
from lightning_influence.support.errors import (
    InfluenceError,
    InfluenceWarning,
    LossCaptureError,
    NonFiniteError,
    UnsupportedDataError,
)


@pytest.mark.parametrize("ratio", [0, -1, 1.5, float("nan"), "5%", True])
def test_ratio(wrapped, ratio):
    with pytest.raises(ValueError, match=r"Got ratio=.*\(0, 1\], such as 0.05"):
        wrapped.forget([0], train(), ratio=ratio)
    with pytest.raises(ValueError, match="Got ratio="):
        wrapped.select_parameters([0], train(), ratio=ratio)


@pytest.mark.parametrize(
    "nothing", [[], torch.zeros(60, dtype=torch.bool), torch.tensor([], dtype=torch.int64)]
)
def test_nothing_to_forget(wrapped, nothing):
    with pytest.raises(ValueError, match=r"nothing to edit: `examples` is empty"):
        wrapped.forget(nothing, train())


def test_everything_to_forget(wrapped):
    with pytest.raises(ValueError, match=r"All 60 training examples .* Train a new model"):
        wrapped.forget(range(60), train())


def test_examples_that_are_not_there(wrapped):
    with pytest.raises(UnsupportedDataError, match=r"Examples 60, 99 are not among the 60"):
        wrapped.forget([3, 99, 60], train())
    with pytest.raises(UnsupportedDataError, match=r"Examples -1 are not among"):
        wrapped.forget([-1], train())


@pytest.mark.parametrize("examples", ["zeros", {1, 2}, None, train()])
def test_examples_of_another_kind(wrapped, examples):
    with pytest.raises(ValueError, match=r"Got examples of type .* accepted are dataset indices"):
        wrapped.forget(examples, train())


def test_a_mask_over_something_else(wrapped):
    with pytest.raises(ValueError, match=r"mask of shape \(59,\) over 60 training examples"):
        wrapped.forget(torch.ones(59, dtype=torch.bool), train())
    picked = torch.zeros(60, dtype=torch.bool)
    picked[[3, 9]] = True
    first, second = (wrapped.select_parameters(ask, train()) for ask in (picked, [9, 3]))
    assert torch.equal(first.flat(), second.flat())


def test_examples_named_twice(wrapped):
    with pytest.raises(ValueError, match="Examples 3 come twice"):
        wrapped.forget([3, 4, 3], train())


@pytest.mark.parametrize("examples", [torch.tensor([0.5]), torch.tensor([[1, 2]])])
def test_examples_that_are_no_indices(wrapped, examples):
    with pytest.raises(ValueError, match="accepted are dataset indices"):
        wrapped.forget(examples, train())


@pytest.mark.parametrize(
    ("option", "value", "accepted"),
    [
        ("rule", "best", "'gain'"),
        ("method", "newton", "'gif'"),
        ("step", "small", "'search', 'theory' or a positive number"),
        ("step", 0, "positive number"),
        ("step", [1], "positive number"),
        ("damping", -1.0, "'auto' or a number"),
        ("damping", "big", "'auto' or a number"),
        ("damping", float("inf"), "'auto' or a number"),
        ("curvature", "fisher", "hessian"),
        ("solver", "lu", "lissa"),
        ("tolerance", -1, "at least 0"),
        ("weight_decay", "auto", "at least 0"),
        ("max_steps", 0, "at least 1"),
        ("linearisations", 1.5, "at least 1"),
        ("curvature_examples", 0, "at least 1"),
        ("seed", -1, "at least 0"),
        ("kept_bound", None, "at least 0"),
    ],
)
def test_options(wrapped, option, value, accepted):
    with pytest.raises(ValueError, match=rf"Got {option}=.*{accepted}"):
        wrapped.forget([0], train(), **{option: value})


def test_unknown_option(wrapped):
    with pytest.raises(TypeError, match="stepsize"):
        wrapped.forget([0], train(), stepsize=1)


def test_lissa_is_for_gif():
    with pytest.raises(ValueError, match=r"solver='lissa' with method='if'"):
        EditOptions(solver="lissa", method="if")


def test_layers_as_a_text(wrapped):
    with pytest.raises(TypeError, match=r"layers=\['body.0'\]"):
        wrapped.forget([0], train(), layers="body.0")


def test_several_training_loaders(wrapped):
    with pytest.raises(UnsupportedDataError, match="Got 2 training loaders"):
        wrapped.forget([0], [train(), train()])


class Dead(Net):
    """Two of its hidden units do nothing at all: whatever goes into them, no output sees it."""

    def __init__(self):
        super().__init__(4)
        with torch.no_grad():
            self.body[3].weight[:, :2] = 0
        self.body[0].bias.requires_grad_(False)


class DeadUnits(SelectionRule):
    """Chooses what leads into the dead units."""

    name = "dead"

    def mask(self, scores, shape, ratio, generator):
        chosen = torch.zeros(shape, dtype=torch.bool)
        chosen[0, :2] = shape[1] == 4
        return chosen


@pytest.mark.parametrize("method", ["gif", "fif", "pif"])
def test_a_selection_that_misses_all_gradient(method):
    with (
        pytest.raises(InfluenceError, match=r"8 selected parameters miss the gradient .* Use another rule"),
        quiet(),
    ):
        asked(Dead()).forget(
            of_class(0), train(), rule=DeadUnits(), ratio=1.0, method=method, layers=["body.0"]
        )


class DeadAndOne(DeadUnits):
    def mask(self, scores, shape, ratio, generator):
        chosen = super().mask(scores, shape, ratio, generator)
        chosen[0, 3] = True
        return chosen


def test_a_singular_subset():
    options = {"rule": DeadAndOne(), "ratio": 1.0, "layers": ["body.0"], "solver": "dense"}
    with quiet():
        with pytest.raises(
            SingularSubsetError, match=r"12 selected parameters are singular.*positive damping"
        ):
            asked(Dead()).forget(of_class(0), train(), damping=0, **options)
        asked(Dead()).forget(of_class(0), train(), step="theory", **options)  # the default damping serves


def test_a_singular_system_along_the_gradient():
    """Without curvature but with gradient: a model that is sure of all it keeps."""
    module = InfluenceModule(lightning_module(CASES["linear"]))
    case = CASES["linear"]
    with torch.no_grad():
        module.model.model[0].weight.mul_(1e4)
    with pytest.raises(InfluenceError, match=r"singular at damping 0|miss the gradient"):
        module.forget([0], loader(case, 5), damping=0, method="fif", ratio=1.0)


def test_an_edit_that_costs_too_much(wrapped, source):
    with pytest.warns(InfluenceWarning, match=r"raises the mean loss on the kept examples .*edit.revert\(\)"):
        edit = wrapped.forget(of_class(0), train(), rule="lowest_gradients", ratio=0.1, step=3000)
    assert any("kept_bound=0.1" in note for note in edit.report.notes)
    before = {name: value.clone() for name, value in source.state_dict().items()}
    edit.apply().revert()  # the way back
    assert all(torch.equal(before[name], value) for name, value in source.state_dict().items())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapped.forget(of_class(0), train(), ratio=0.2, kept_bound=1e9)


def test_an_edit_that_cannot_forget(wrapped):
    class Bias(SelectionRule):
        """One bias of a hidden unit: not enough to forget a class."""

        name = "bias"

        def mask(self, scores, shape, ratio, generator):
            chosen = torch.zeros(shape, dtype=torch.bool)
            chosen[0, 0, -1] = True
            return chosen

    with pytest.warns(InfluenceWarning, match=r"No step makes the model forget .* ratio="):
        wrapped.forget(of_class(0), train(), rule=Bias(), layers=["body.0"])


def test_a_direction_that_does_not_help(wrapped, monkeypatch):
    """One shot is refused; in several steps the descent starts from where the model is."""
    monkeypatch.setattr(directions, "_DIRECTIONS", dict(directions._DIRECTIONS))
    register_direction("uphill")(lambda problem: SubsetSolution(-problem.gradient * problem.mask, 0.0, 1))
    request = (of_class(2)[:5], 0, train())
    with quiet():
        with pytest.raises(InfluenceError, match=r"No step along .* lowers the loss .*larger ratio"):
            wrapped.relabel(*request, method="uphill", ratio=0.3, linearisations=1)
        report = wrapped.relabel(*request, method="uphill", ratio=0.3).report
    assert report.step[0] == 0
    assert report.edited.after < report.edited.before


def test_a_solver_that_stops_early_says_so(wrapped):
    with pytest.warns(InfluenceWarning, match=r"residual of 0\.\d\d only, after 1 iterations"):
        wrapped.forget(
            of_class(0), train(), ratio=1.0, max_steps=1, tolerance=1e-6, damping=1e-4, step="theory"
        )


def test_targets(wrapped):
    with pytest.raises(ValueError, match="Got 2 new targets for 3 examples"):
        wrapped.relabel([0, 1, 2], [1, 1], train())
    with pytest.raises(ValueError, match="new_targets=None"):
        wrapped.relabel([0, 1, 2], None, train())
    with pytest.raises(ValueError, match="new targets of type str"):
        wrapped.relabel([0, 1, 2], "one", train())
    with pytest.raises(UnsupportedDataError, match=r"are torch.float32, .* torch.int64. Pass integers"):
        wrapped.relabel([0], 1.5, train())
    with pytest.raises(UnsupportedDataError, match=r"A new target has shape \(2,\)"):
        wrapped.relabel([0], torch.zeros(1, 2), train())


def test_targets_that_are_the_old_ones(wrapped):
    with pytest.raises(InfluenceError, match=r"new targets are the old ones"):
        wrapped.relabel(of_class(0), 0, train())


class Mapped(Net):
    def training_step(self, batch, batch_idx):
        return super().training_step((batch["x"], batch["label"]), batch_idx)


def by_name(items):
    x, y = zip(*items, strict=True)
    return {"x": torch.stack(x), "label": torch.stack(y)}


def test_batches_of_another_form():
    train = DataLoader(blobs(), 16, collate_fn=by_name)
    with pytest.raises(UnsupportedDataError, match=r"this one is a dict. Pass set_targets=f"):
        asked(Mapped()).relabel([0], 1, train)

    def put(batch, rows, targets):
        label = batch["label"].clone()
        label[rows] = targets
        return {**batch, "label": label}

    with quiet():
        edit = asked(Mapped()).relabel([0, 5], [1, 0], train, set_targets=put, step="theory")
        plain = asked(Mapped()).forget([0, 5], train, step="theory")
    assert (edit.report.kind, plain.report.kind) == ("relabel", "forget")


class Handwritten(Net):
    """A loss that the library cannot read: what a model that knows nothing would lose is not known."""

    def influence_loss(self, batch):
        x, y = batch
        return -self(x).log_softmax(1).gather(1, y[:, None])[:, 0]


def test_a_loss_whose_outputs_are_unknown():
    with quiet():
        with pytest.raises(LossCaptureError, match=r"Pass forgotten_loss=.*step='theory'"):
            asked(Handwritten()).forget(of_class(0), train())
        assert asked(Handwritten()).select_parameters(of_class(0), train(), ratio=0.1).count > 0
        assert asked(Handwritten()).forget(of_class(0), train(), step="theory").report.step == [1.0]
        edit = asked(Handwritten()).forget(of_class(0), train(), forgotten_loss=1.5, ratio=1.0)
    assert edit.report.edited.after > 1.5


def test_values_that_are_not_finite(wrapped):
    x, y = blobs().tensors
    x = x.clone()
    x[7] = float("nan")
    for ask in (wrapped.forget, lambda *given: wrapped.relabel(given[0], 1, given[1])):
        with pytest.raises(NonFiniteError, match=r"loss .*not finite|loss is NaN or infinite"):
            ask([0], DataLoader(TensorDataset(x, y), 16))


def test_layers_that_take_no_part():
    class Spare(Net):
        def __init__(self):
            super().__init__()
            self.spare = nn.Linear(2, 2)

    with pytest.warns(InfluenceWarning, match=r"\['spare'\] take no part"):
        edit = asked(Spare()).forget(of_class(0), train(), ratio=0.5, step="theory")
    assert not any(name.startswith("spare") for name in edit.changes)


def test_uncovered_parameters_are_named():
    module = lightning_module(CASES["mlp_batchnorm_dropout"])
    with pytest.warns(InfluenceWarning, match=r"not selected.*leaves them as they are"):
        InfluenceModule(module).forget(
            [0], loader(CASES["mlp_batchnorm_dropout"], 5), step="theory", ratio=0.5, layers=["model.0"]
        )
