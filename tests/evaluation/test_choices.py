"""Choices of examples and counts: indices and masks mean the same everywhere, the rest is refused."""

import numpy as np
import pytest
import torch
from torch import nn

from lightning_influence.evaluation.losses import squared_error
from lightning_influence.evaluation.pbrf import proximal_response
from lightning_influence.evaluation.removal import leave_one_out, removal_curve, removal_masks

SIZE = 6
INPUTS = torch.randn(SIZE, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TARGETS = INPUTS.sum(1, keepdim=True).tanh()


def model():
    layer = nn.Linear(2, 1).double()
    nn.init.constant_(layer.weight, 0.3)
    nn.init.constant_(layer.bias, 0.1)
    return layer


def respond(examples, loss=squared_error, **options):
    data = INPUTS, TARGETS
    return proximal_response(model(), data, data, examples, damping=0.1, loss=loss, **options).scores


def leave_out(examples):
    return leave_one_out(lambda masks: masks.double() @ INPUTS, SIZE, examples)


MASK = torch.arange(SIZE).remainder(3) == 1


@pytest.mark.parametrize("answer", [respond, leave_out])
@pytest.mark.parametrize(
    "examples", [MASK, MASK.numpy(), MASK.tolist(), torch.tensor([1, 4]), np.array([1, 4]), (1, 4)]
)
def test_masks_and_arrays_are_indices(answer, examples):
    torch.testing.assert_close(answer(examples), answer([1, 4]), rtol=0, atol=0)


@pytest.mark.parametrize("answer", [respond, leave_out])
@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([-1], r"indices of the 6 training examples, got \[-1\]: accepted are 0 to 5"),
        ([6], r"got \[6\]"),
        ([], r"got \[\]"),
        (MASK & False, r"got \[\].*a boolean mask over the examples that is true somewhere"),
        (MASK[1:], r"shape \(5,\) and torch\.bool; accepted are .* a boolean mask of shape \(6,\)"),
        ([0.5], r"shape \(1,\) and torch\.float32; accepted are dataset indices"),
        (1, r"shape \(\) and torch\.int64; accepted are dataset indices"),
        ("all", "type str; accepted are dataset indices"),
    ],
)
def test_what_is_no_choice_of_examples_is_refused(answer, examples, message):
    with pytest.raises(ValueError, match=message):
        answer(examples)


def test_leaving_out_the_only_example_is_refused():
    with pytest.raises(ValueError, match=r"needs 2 or more of them, got num_examples=1"):
        leave_one_out(lambda masks: masks.double(), 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": nn.functional.mse_loss}, r"`loss` returned shape \(\)"),
        ({"measurement": nn.functional.mse_loss}, r"`measurement` returned shape \(\)"),
        ({"measurement": lambda f, y: f}, r"`measurement` returned shape \(6, 1\); accepted is .*\(6,\)"),
    ],
)
def test_a_response_of_what_is_not_per_example_is_refused(options, message):
    with pytest.raises(ValueError, match=rf'{message}.*reduction="none"'):
        respond([0], **options)


SCORES = torch.arange(12.0, dtype=torch.float64).view(2, SIZE)


def retrained(masks):
    return masks.double() @ SCORES.T


@pytest.mark.parametrize("counts", [torch.tensor([1, 3]), np.array([1, 3]), range(1, 4, 2), (1, 3)])
def test_counts_are_any_sequence_of_integers(counts):
    curve = removal_curve(SCORES, retrained, counts)
    assert curve.counts.tolist() == [1, 3]
    assert torch.equal(curve.changes, removal_curve(SCORES, retrained, [1, 3]).changes)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([1.5], r"from 1 to N - 1 = 5, got \[1\.5\]: accepted are integers"),
        (3, "got 3: accepted are integers"),
        ([], r"got \[\]"),
        ([True], r"got \[True\]"),
        (torch.tensor([1.0]), r"got tensor\(\[1\.\]\)"),
    ],
)
@pytest.mark.parametrize("function", [removal_masks, lambda s, c: removal_curve(s, retrained, c)])
def test_counts_that_are_none_are_refused(function, counts, message):
    with pytest.raises(ValueError, match=message):
        function(SCORES, counts)
