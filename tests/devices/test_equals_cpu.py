"""Whatever is asked of a model on an accelerator has the answer that it has on the CPU."""

import functools

import pytest
import torch
from device_models import MODELS, fit, make_loader
from pretended_device import NAME, PretendedTensor
from torch import Tensor

from lightning_influence import InfluenceModule

pytestmark = [
    pytest.mark.devices,
    pytest.mark.filterwarnings("ignore:.*tolerance", "ignore:.*answer of"),
    pytest.mark.filterwarnings("ignore:No step makes", "ignore:The edit raises", "ignore:.*limit"),
]
METHODS = [
    "identity",
    "diagonal",
    "kfac",
    "ekfac",
    "exact",
    "block_ggn",
    "auto",
    "cg",
    "minres",
    "lissa",
    "astra",
]
CPU, DEVICE = torch.device("cpu"), torch.device(NAME, 0)


@functools.cache
def fitted(kind, on_device):
    """A model fitted once on the CPU and once on the device, inside a test that has it."""
    return fit(kind, DEVICE if on_device else CPU)


def ask_both(kind, device, question):
    """Return the answers to a question on the CPU and on the device."""
    ours, theirs = (question(fitted(kind, on_device)) for on_device in (True, False))
    return ours, theirs


def assert_same(ours, theirs, rtol=1e-10):
    for one, other in zip(ours, theirs, strict=True):
        assert isinstance(other, Tensor)
        assert other.numel() > 0
        assert not isinstance(one, PretendedTensor), "answers are on the CPU"
        torch.testing.assert_close(one, other, rtol=rtol, atol=rtol * float(other.abs().max()))


@pytest.fixture(params=MODELS)
def kind(request):
    return request.param


def test_weights_and_factors_of_a_fit(device, kind):
    def question(found):
        callback = found.trainer.callbacks[0]
        assert callback.num_collected > 0
        layers = callback.factors.layers
        assert layers
        return [
            *(parameter.detach().cpu() for parameter in found.module.parameters()),
            *(
                part.cpu()
                for layer in layers.values()
                for part in (layer.inputs, layer.outputs, layer.squares)
            ),
        ]

    assert_same(*ask_both(kind, device, question))


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        *(("convolutional", method) for method in METHODS),
        ("sequential", "ekfac"),
        pytest.param("sequential", "auto", marks=pytest.mark.slow),
    ],
)
def test_scores(device, kind, method):
    assert_same(
        *ask_both(
            kind, device, lambda f: [f.trainer.influence(f.module, f.train, f.queries, method=method).scores]
        )
    )


def test_scores_by_the_hessian(device):
    def question(found):
        rows = torch.utils.data.DataLoader(torch.utils.data.Subset(found.train.dataset, range(6)), 6)
        options = {"method": "hessian", "layers": ["net.head.4"]}
        return [found.trainer.influence(found.module, rows, found.queries, **options).scores]

    assert_same(*ask_both("convolutional", device, question), rtol=1e-8)


@pytest.mark.parametrize(
    ("kind", "fisher"),
    [("convolutional", "sampled"), ("convolutional", "empirical"), ("sequential", "mixed")],
)
def test_refitted_factors(device, kind, fisher):
    options = {"method": "ekfac", "factors": "refit", "fisher": fisher}
    assert_same(
        *ask_both(
            kind, device, lambda f: [f.trainer.influence(f.module, f.train, f.queries, **options).scores]
        )
    )


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 3},
        {"aggregate": "mean"},
        {"aggregate": [0, 0, 1, 1, 0, 1]},
        {"by": "layer"},
        {"measurement": "margin"},
        {"train_groups": [0, 1, 2, 3] * 8},
    ],
    ids=lambda options: "-".join(map(str, options)),
)
def test_other_questions(device, options):
    def question(found):
        answer = found.trainer.influence(found.module, found.train, found.queries, method="ekfac", **options)
        found = [
            answer.scores,
            answer.top_scores,
            answer.bottom_scores,
            answer.top_indices,
            answer.train_indices,
        ]
        return [part for part in found if part is not None]

    assert_same(*ask_both("convolutional", device, question))


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("convolutional", "ekfac"),
        ("convolutional", "auto"),
        ("sequential", "ekfac"),
        pytest.param("sequential", "auto", marks=pytest.mark.slow),
    ],
)
def test_self_influence(device, kind, method):
    assert_same(
        *ask_both(kind, device, lambda f: [f.trainer.self_influence(f.module, f.train, method=method).scores])
    )


def test_training_dynamics(device, kind):
    def question(found):
        told = found.trainer.training_dynamics()
        return [told.loss_mean, told.margin_mean, told.forgotten, told.first_learned]

    assert_same(*ask_both(kind, device, question))


@pytest.mark.parametrize(
    ("kind", "kind_of_edit"),
    [
        ("convolutional", "forget"),
        ("convolutional", "relabel"),
        pytest.param("sequential", "forget", marks=pytest.mark.slow),
    ],
)
def test_edits(device, kind, kind_of_edit):
    def question(found):
        rows = [0, 1]
        ask = (
            found.trainer.forget(rows, found.module, found.train)
            if kind_of_edit == "forget"
            else found.trainer.relabel(rows, [2, 2], found.module, found.train)
        )
        before = [parameter.detach().cpu().clone() for parameter in found.module.parameters()]
        ask.apply()
        edited = [parameter.detach().cpu().clone() for parameter in found.module.parameters()]
        ask.revert()
        after = [parameter.detach().cpu() for parameter in found.module.parameters()]
        assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
        return edited

    assert_same(*ask_both(kind, device, question), rtol=1e-7)


def test_a_module_that_stays_on_the_device(device):
    """Without a Trainer the module is where the user has put it."""
    kind = "convolutional"

    def question(found):
        place = device if found is fitted(kind, True) else CPU
        module = found.module.to(place)
        asked = InfluenceModule(module)
        scores = asked.scores(found.train, found.queries, method="ekfac").scores
        spectrum = asked.spectrum(make_loader(kind, 16, 3)).density(16)
        assert next(module.parameters()).device.type == place.type
        found.module.to(CPU)
        return [scores, *(part for part in spectrum if isinstance(part, Tensor))]

    assert_same(*ask_both(kind, device, question), rtol=1e-8)
