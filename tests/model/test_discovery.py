import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lightning_influence.model.layers.layer import find_rule, supported_types
from lightning_influence.model.layers.plan import find_layers
from lightning_influence.support.errors import UnsupportedModelError


class Doubled(nn.Linear):
    """Computes something else than its base class."""

    def forward(self, x):
        return 2 * super().forward(x)


class Renamed(nn.Linear):
    """Only a name, and a parameter that the forward pass of its base class cannot use."""

    def __init__(self, *args):
        super().__init__(*args)
        self.extra = nn.Parameter(torch.zeros(7))


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def test_every_parameter_is_covered_or_listed():
    plan = find_layers(model(), parameters=False)
    assert list(plan.layers) == ["0", "2", "4"]
    assert [layer.shape for layer in plan.layers.values()] == [(1, 4, 4), (1, 4, 5), (1, 2, 5)]
    assert plan.uncovered == {
        "3.weight": (4, "LayerNorm is not supported"),
        "3.bias": (4, "LayerNorm is not supported"),
    }
    assert plan.numel == 16 + 20 + 10
    assert plan.coverage == pytest.approx(46 / 54)
    text = plan.describe_uncovered()
    assert text.startswith("14.8% of the trainable parameters are not covered")
    assert "3.weight (4: LayerNorm is not supported), 3.bias (4:" in text
    assert "Supported layers: Conv1D, Conv1d, Conv2d, Conv3d, Linear." in text
    assert plan.describe_uncovered(limit=1).count("LayerNorm") == 1
    assert "and 1 more" in plan.describe_uncovered(limit=1)


def test_full_coverage_has_nothing_to_describe():
    plan = find_layers(nn.Linear(2, 2), parameters=False)
    assert list(plan.layers) == [""]
    assert plan.coverage == 1
    assert plan.describe_uncovered() is None


def test_frozen_weight_and_frozen_bias():
    net = model()
    net[0].weight.requires_grad_(False)
    net[2].bias.requires_grad_(False)
    plan = find_layers(net, parameters=False)
    assert list(plan.layers) == ["2", "4"]
    assert plan.layers["2"].shape == (1, 4, 4)
    assert not plan.layers["2"].has_bias
    assert plan.uncovered["0.bias"] == (4, "its weight is frozen")
    assert "0.weight" not in plan.uncovered
    assert "2.bias" not in plan.uncovered


def test_tied_weights_are_refused_and_a_module_under_two_names_is_one_layer():
    net = model()
    net[4].weight = nn.Parameter(torch.zeros(2, 4))
    net[2].weight = net[0].weight = nn.Parameter(torch.zeros(4, 4))
    plan = find_layers(net, parameters=False)
    assert list(plan.layers) == ["4"]
    assert plan.uncovered["0.weight"] == (16, "shared with another module")
    assert plan.uncovered["2.bias"] == (4, "shared with another module")
    again = nn.Linear(3, 3)
    assert list(find_layers(nn.Sequential(again, nn.ReLU(), again), parameters=False).layers) == ["0"]


def test_tied_to_an_unsupported_module():
    net = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5), nn.Linear(5, 2))
    net[1].weight = net[0].weight
    plan = find_layers(net, parameters=False)
    assert list(plan.layers) == ["2"]
    assert plan.uncovered["1.bias"] == (5, "shared with another module")
    assert set(plan.uncovered) == {"0.weight", "1.bias"}


def test_parametrized_and_computed_weights_are_refused():
    net = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(3, 4)),
        nn.utils.spectral_norm(nn.Linear(4, 4)),
        nn.Linear(4, 2),
    )
    plan = find_layers(net, parameters=False)
    assert list(plan.layers) == ["2"]
    reasons = {name: why for name, (_, why) in plan.uncovered.items()}
    assert {why for name, why in reasons.items() if name.startswith("0.")} == {"parametrized weight"}
    assert reasons["1.weight_orig"] == "its weight is computed, not a parameter"
    assert sum(count for count, _ in plan.uncovered.values()) == 12 + 4 + 4 + 16 + 4


def test_subclasses_are_served_unless_they_compute_something_else():
    net = nn.Sequential(Doubled(2, 2), Renamed(2, 3))
    plan = find_layers(net, parameters=False)
    assert list(plan.layers) == ["1"]
    assert plan.uncovered["0.weight"] == (4, "Doubled is not supported")
    assert plan.uncovered["1.extra"][0] == 7
    assert plan.numel == 9
    assert find_rule(net[0]) is None
    assert find_rule(net[1]) is find_rule(nn.Linear(1, 1))
    assert supported_types() == ["Conv1D", "Conv1d", "Conv2d", "Conv3d", "Linear"]


@pytest.mark.parametrize(
    ("include", "selected"),
    [(["0"], ["0"]), (["[24]"], ["2", "4"]), (["4", "0"], ["0", "4"]), (["*"], ["0", "2", "4"])],
)
def test_include_patterns(include, selected):
    plan = find_layers(model(), include, parameters=False)
    assert list(plan.layers) == selected
    left = {"0", "2", "4"} - set(selected)
    assert {name.split(".")[0] for name, (_, why) in plan.uncovered.items() if why == "not selected"} == left


@pytest.mark.parametrize("pattern", ["encoder.*", "3", "1"])
def test_a_pattern_that_selects_nothing_is_refused(pattern):
    with pytest.raises(
        UnsupportedModelError, match=r"selects no supported, trainable layer.*\['0', '2', '4'\]"
    ):
        find_layers(model(), ["0", pattern], parameters=False)


def test_a_model_without_supported_layers_is_refused():
    net = nn.Sequential(nn.Embedding(3, 3), nn.LayerNorm(3))
    with pytest.raises(
        UnsupportedModelError, match=r"\['Embedding', 'LayerNorm'\].*Supported layers: Conv1D.*Register"
    ):
        find_layers(net, parameters=False)
    for none in (nn.ReLU(), nn.Linear(2, 2).requires_grad_(False)):
        with pytest.raises(UnsupportedModelError, match="no trainable parameter"):
            find_layers(none)


def test_patterns_with_an_exclamation_mark_leave_out():
    assert list(find_layers(model(), ["!2"]).layers) == ["0", "3.weight", "3.bias", "4"]
    assert list(find_layers(model(), ["[0-2]", "!0"]).layers) == ["2"]
    assert find_layers(model(), ["!2"]).uncovered["2.weight"] == (16, "not selected")
    with pytest.raises(UnsupportedModelError, match="layers='!decoder' selects no supported"):
        find_layers(model(), ["!decoder"])
    with pytest.raises(UnsupportedModelError, match="no trainable layer"):
        find_layers(model(), ["!*"])


def test_what_is_left_out_by_name_was_not_selected_whatever_owns_it():
    plan = find_layers(model(), ["0"])
    assert {why for _, why in plan.uncovered.values()} == {"not selected"}
    assert "3.weight" in plan.uncovered  # of a norm
    assert "Supported layers" not in plan.describe_uncovered()
