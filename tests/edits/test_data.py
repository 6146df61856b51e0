"""Masks, new targets and losses of the user's own: what an edit makes of them, and what it refuses."""

import pytest
import torch
from edit_models import asked, blobs, of_class, quiet, train
from influence_models import Net
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset, WeightedRandomSampler

from lightning_influence import InfluenceModule
from lightning_influence.api.module import EditsParameters
from lightning_influence.edits.request import EditOptions, EditRequest
from lightning_influence.edits.start import set_out
from lightning_influence.running.loop_runner import LoopRunner
from lightning_influence.support.errors import (
    LossCaptureError,
    NonFiniteError,
    UnsupportedDataError,
)


def values(edit):
    return {name: change.after for name, change in edit.changes.items()}


def same_edits(first, second):
    return all(torch.equal(value, values(second)[name]) for name, value in values(first).items())


# The loss of a model that knows nothing, with `influence_loss`


class Sure(Net):
    """A module that knows its examples to the bit a long way along the direction that forgets them."""

    def __init__(self):
        super().__init__(8)
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


class Hooked(Sure):
    def influence_loss(self, batch):
        return functional.cross_entropy(self(batch[0]), batch[1], reduction="none")


def known(kind):
    """A module trained on 120 examples, which belong to three classes."""
    torch.manual_seed(0)
    x = torch.randn(120, 6)
    y = (x @ torch.randn(6, 3)).argmax(1)
    module = kind()
    optimizer = torch.optim.Adam(module.parameters(), 0.02)
    for _ in range(100):
        optimizer.zero_grad()
        functional.cross_entropy(module(x), y).backward()
        optimizer.step()
    return InfluenceModule(module), TensorDataset(x, y), y


@pytest.mark.parametrize("batch_size", [16, 120])
def test_forgetting_with_a_loss_of_ones_own_is_that_without(batch_size):
    edits = []
    for kind in (Sure, Hooked):
        module, dataset, y = known(kind)
        with quiet():
            edits.append(module.forget(y == 0, DataLoader(dataset, batch_size), ratio=0.3))
    plain, hooked = (edit.report for edit in edits)
    assert hooked.step == pytest.approx(plain.step)
    assert hooked.edited.after == pytest.approx(plain.edited.after)
    assert hooked.edited.after > 1.1  # log 3


def test_where_the_loss_of_knowing_nothing_is_unknown_nothing_counts_as_forgotten():
    module, dataset, y = known(Hooked)
    loader = DataLoader(dataset, 16)
    request = EditRequest(y == 0)
    split = request.split(loader)
    with LoopRunner(module.model) as runner:
        losses = set_out(runner, request, split, None).losses.at(split.edited)
    assert losses.chance.tolist() == pytest.approx([1.0986] * len(split.edited), rel=1e-3)
    losses._chance[0] = torch.nan
    with pytest.raises(LossCaptureError, match=rf"not known .* {split.edited[0]}\. Pass forgotten_loss="):
        _ = losses.chance


@pytest.mark.slow
def test_kept_examples_that_are_known_to_the_bit_do_not_matter():
    """Losses of zero tell nothing of the function behind them, but only the edited ones have to be known."""

    class Zero(Hooked):
        def influence_loss(self, batch):
            return super().influence_loss(batch) * (batch[1] < 2)

    module, dataset, y = known(Zero)
    order = y.argsort()
    grouped = TensorDataset(*(part[order] for part in dataset.tensors))
    with quiet():
        report = module.forget(y[order] == 0, DataLoader(grouped, 1), ratio=0.3).report
    assert report.edited.after > 1.1


# Masks


def drawn(sampler=None):
    return train(shuffle=False, sampler=sampler or SubsetRandomSampler(range(0, 60, 2)))


def test_a_mask_is_over_the_dataset_also_where_the_loader_draws_a_part(wrapped):
    mask = torch.zeros(60, dtype=torch.bool)
    mask[[4, 20]] = True
    for given in (mask, mask.numpy(), mask.tolist()):
        by_mask = wrapped.forget(given, drawn(), step="theory", ratio=0.3)
        assert same_edits(by_mask, wrapped.forget([4, 20], drawn(), step="theory", ratio=0.3))


@pytest.mark.parametrize("length", [30, 59, 61])
def test_a_mask_over_the_drawn_examples_is_refused(wrapped, length):
    with pytest.raises(
        ValueError, match=rf"mask of shape \({length},\) over 60 .*each example of the dataset, .*\(30 are\)"
    ):
        wrapped.forget(torch.ones(length, dtype=torch.bool), drawn())


@pytest.mark.parametrize(
    "sampler", [SubsetRandomSampler(range(50)), WeightedRandomSampler([1.0] * 50 + [0.0] * 10, 60)]
)
def test_a_mask_at_examples_that_are_not_drawn(wrapped, sampler):
    with pytest.raises(
        UnsupportedDataError, match=r"True at examples 51, 54, 57 .* does not draw: it draws 50 of 60"
    ):
        wrapped.forget(blobs().tensors[1] == 0, drawn(sampler))


@pytest.mark.parametrize("wrap", [lambda loader: [loader], lambda loader: {"a": loader}])
def test_the_dataset_of_a_loader_in_a_list(wrapped, wrap):
    with pytest.raises(ValueError, match=r"shape \(30,\) over 60"):
        wrapped.forget(torch.ones(30, dtype=torch.bool), wrap(drawn()))


def test_a_mask_over_ready_made_batches(wrapped):
    mask = blobs().tensors[1] == 0
    batches = list(train(shuffle=False))
    one, other = (wrapped.forget(mask, given, step="theory", ratio=0.3) for given in (batches, train()))
    assert len(one.changes) == len(other.changes)
    with pytest.raises(ValueError, match=r"shape \(16,\) over 60"):
        wrapped.forget(mask[:16], batches)


@pytest.mark.parametrize("convert", [torch.Tensor.int, torch.Tensor.byte, lambda mask: mask.int().numpy()])
def test_a_mask_of_integers(wrapped, convert):
    with pytest.raises(ValueError, match=r"Examples 0, 1 come twice.*pass mask\.bool\(\)"):
        wrapped.forget(convert(blobs().tensors[1] == 0), train())


# New targets


@pytest.mark.parametrize(("targets", "wrong"), [([7, 1], "7"), ([1, -1], "-1"), (3, "3")])
def test_targets_that_are_no_classes(wrapped, targets, wrong):
    says = rf"of examples 1, 2 cannot be computed .* Target {wrong} is out of bounds.* {wrong}\b.*C - 1"
    with pytest.raises(UnsupportedDataError, match=says):
        wrapped.relabel([1, 2], targets, train(), step="theory")


def test_one_label_for_all_is_no_list(wrapped):
    options = {"step": "theory", "ratio": 0.3}
    examples = of_class(0)[:4]
    one, each = (wrapped.relabel(examples, given, train(), **options) for given in (1, [1] * 4))
    assert same_edits(one, each)
    with pytest.raises(
        ValueError, match=r"Got 1 new targets for 4 examples; .* one for all, of the shape of"
    ):
        wrapped.relabel(examples, [1], train())


class Regressor(Net):
    def __init__(self, outputs):
        super().__init__(8)
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, outputs))

    def training_step(self, batch, batch_idx):
        return functional.mse_loss(self(batch[0]), batch[1])


def regression(outputs):
    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(torch.randn(30, 4), torch.randn(30, outputs)), 8)
    return InfluenceModule(Regressor(outputs)), loader


@pytest.mark.grid
@pytest.mark.parametrize("outputs", [1, 4])
@pytest.mark.parametrize("count", [3, 4])
def test_one_target_for_all_has_the_shape_of_one_of_an_example(outputs, count):
    module, loader = regression(outputs)
    state = torch.get_rng_state()
    options = {"step": "theory", "ratio": 0.5}
    examples = list(range(count))[::-1]
    target = torch.arange(outputs) / 2
    expected = module.relabel(examples, target.expand(count, -1), loader, **options)
    given = [target, target.tolist()]
    given += [0.0, [0.0] * count] if outputs == 1 else []
    for one in given:
        assert same_edits(expected, module.relabel(examples, one, loader, **options))
    assert torch.equal(state, torch.get_rng_state())


def test_targets_of_other_shapes_are_refused():
    module, loader = regression(4)
    with pytest.raises(UnsupportedDataError, match=r"new target has shape \(\), .* \(4,\)"):
        module.relabel([0, 1], 0.0, loader)
    with pytest.raises(ValueError, match="Got 3 new targets for 2 examples"):
        module.relabel([0, 1], torch.zeros(3), loader)


@pytest.mark.parametrize("method", [["gif"], {"gif"}, None, 3])
def test_methods_that_are_no_text(wrapped, method):
    with pytest.raises(ValueError, match=r"Got method=.*'gif'"):
        wrapped.forget([0], train(), method=method)


# Examples without weight


def partly_ignored(batch_size=16):
    x, y = blobs().tensors
    y = y.clone()
    y[:5] = -100
    return DataLoader(TensorDataset(x, y), batch_size)


@pytest.mark.parametrize("examples", [[0, 1], [0, 1, 30]])
@pytest.mark.parametrize("step", ["theory", "search"])
def test_ignored_examples_cannot_be_forgotten(wrapped, examples, step):
    with pytest.raises(UnsupportedDataError, match=r"Examples 0, 1 have no weight .* Leave them out"):
        wrapped.forget(examples, partly_ignored(), step=step)


def test_a_class_of_weight_zero_cannot_be_forgotten(source):
    class Weighted(Net):
        def training_step(self, batch, batch_idx):
            return functional.cross_entropy(self(batch[0]), batch[1], weight=torch.tensor([0.0, 1.0, 1.0]))

    module = Weighted(16)
    module.load_state_dict(source.state_dict())
    with pytest.raises(UnsupportedDataError, match=r"no weight .*classes of weight zero"):
        asked(module).forget(of_class(0), train())


@pytest.mark.parametrize("step", ["theory", "search"])
def test_labels_cannot_become_ignored(wrapped, step):
    with pytest.raises(UnsupportedDataError, match=r"new targets, examples 20, 21 have no weight .* forget"):
        wrapped.relabel([20, 21], [-100, -100], train(), step=step)
    with pytest.raises(UnsupportedDataError, match=r"new targets, examples 21 have no weight"):
        wrapped.relabel([20, 21], [1, -100], train(), step=step)


@pytest.mark.grid
@pytest.mark.parametrize(
    "options", [{"step": "theory"}, {}, {"linearisations": 1}, {"rule": "highest_gradients"}]
)
@pytest.mark.parametrize("examples", [[0, 1], [0, 1, 30]])
def test_ignored_examples_can_be_given_labels(source, wrapped, options, examples):
    labels = (blobs().tensors[1][examples] + 1) % 3
    with quiet():
        edit = wrapped.relabel(examples, labels, partly_ignored(), ratio=0.3, **options)
    assert edit.report.edited.after < edit.report.edited.before
    with edit, torch.no_grad():
        loss = functional.cross_entropy(source.eval()(blobs().tensors[0][examples]), labels)
    source.train()
    assert float(loss) == pytest.approx(edit.report.edited.after, rel=1e-4)


def test_the_theory_for_ignored_examples_counts_their_new_gradient_alone():
    """At a linear model's optimum the change is that of a Newton step on the new objective."""
    torch.manual_seed(0)
    x, y = torch.randn(30, 4).double(), torch.randint(0, 3, (30,))
    y[:3] = -100

    class Linear(Net):
        def __init__(self):
            super().__init__(2)
            self.body = nn.Linear(4, 3).double()

    module = Linear()
    optimizer = torch.optim.LBFGS(
        module.parameters(), 1.0, 500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = functional.cross_entropy(module(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    theta = torch.cat([module.body.weight, module.body.bias[:, None]], 1).detach().flatten()
    new = y.clone()
    new[:2] = torch.tensor([0, 2])

    def objective(flat):
        matrix = flat.view(3, 5)
        return functional.cross_entropy(x @ matrix[:, :4].T + matrix[:, 4], new)

    gradient = torch.autograd.functional.jacobian(objective, theta)
    hessian = torch.autograd.functional.hessian(objective, theta)
    expected = -torch.linalg.solve(hessian + 0.1 * torch.eye(15).double(), gradient)
    with quiet():
        edit = InfluenceModule(module).relabel(
            [0, 1],
            [0, 2],
            DataLoader(TensorDataset(x, y), 2),
            step="theory",
            method="if",
            damping=0.1,
            curvature="ggn",
            solver="dense",
        )
    found = [change.after - change.before for change in edit.changes.values()]
    got = torch.cat([found[0].view(3, 4), found[1].view(3, 1)], 1).flatten()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


def test_a_loss_that_is_nan_for_another_reason_says_so(wrapped):
    x, y = blobs().tensors
    x = x.clone()
    x[0] = float("nan")
    with pytest.raises(NonFiniteError):
        wrapped.forget([0], DataLoader(TensorDataset(x, y), 16))


def test_every_way_to_ask_is_checked_alike(wrapped):
    assert EditOptions().method == "gif"
    for name in ("forget", "select_parameters", "generalized_influence"):
        with pytest.raises(ValueError, match=r"Got method="):
            getattr(EditsParameters, name)(wrapped, [0], train(), method=["gif"])
