"""How often the program waits for an accelerator: not once a batch, but for what is named here.

Each question is asked of few batches and of twice as many: what the numbers of waits differ by is what the
batches take, beside what a pass or a fit takes once.
"""

from collections import Counter
from functools import cache

import pytest
import torch
from device_models import fit, make_loader, make_trainer
from pretended_device import count_waits

from lightning_influence import InfluenceCallback

pytestmark = [
    pytest.mark.devices,
    pytest.mark.filterwarnings(
        "ignore:.*tolerance",
        "ignore:.*answer of",
        "ignore:.*limit",
    ),
]
BATCHES = 8


def waits_of_a_fit(device, batches, callbacks, leave_out=(), **options):
    with count_waits() as waits:
        found = fit(
            "convolutional", device, epochs=1, examples=2 * batches, batch=2, collects=callbacks, **options
        )
    places = [place for place in waits.places if not any(part in place for part in leave_out)]
    return len(places), found


@cache
def warm_up(device):
    """Fit once: the first one of a process tries where decompositions are faster."""
    waits_of_a_fit(device, BATCHES, [InfluenceCallback(every_n_steps=10_000)])


def growth_of_a_fit(device, make, **options):
    """Return by how many waits as many batches again make a fit longer, beyond those without a callback."""
    warm_up(device)
    counts = []
    for callbacks in (make, list):
        few, more = (waits_of_a_fit(device, n, callbacks(), **options)[0] for n in (BATCHES, 2 * BATCHES))
        counts.append(more - few)
    return counts[0] - counts[1]


def test_counting_sees_a_wait(device):
    """What reads a number of every batch is counted."""

    class Reads(InfluenceCallback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            float(outputs["loss"])
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    assert growth_of_a_fit(device, lambda: [Reads(every_n_steps=10_000)]) == BATCHES


def test_steps_that_are_not_collected(device):
    assert growth_of_a_fit(device, lambda: [InfluenceCallback(every_n_steps=10_000)]) == 0


def test_training_dynamics(device):
    make = lambda: [InfluenceCallback(every_n_steps=10_000, dynamics=True)]  # noqa: E731
    assert growth_of_a_fit(device, make) == 0


def test_collected_steps(device):
    """Once a step, to leave out a batch that is not finite; once in eight for the noise scale.

    Left out of the count are eigendecompositions, which wait for each layer, a few times in a fit.
    """
    callback = InfluenceCallback(every_n_steps=1)
    decompositions = ["collecting/sums.py"]
    count, _ = waits_of_a_fit(device, BATCHES, [callback], decompositions)
    twice, _ = waits_of_a_fit(device, 2 * BATCHES, [InfluenceCallback(every_n_steps=1)], decompositions)
    assert callback.num_collected == BATCHES
    assert twice - count <= BATCHES * (1 + 1 / 8)


@pytest.fixture(scope="module")
def trained():
    found = fit("convolutional", torch.device("cpu"), examples=16, collects=[])
    few = torch.utils.data.Subset(found.queries.dataset, range(2))
    return found._replace(queries=torch.utils.data.DataLoader(few, 2))


def growth_of_a_question(trained, device, ask):
    """Return what is waited for with twice as many batches only."""
    found = []
    for batches in (BATCHES, 2 * BATCHES):
        train = make_loader("convolutional", 2 * batches, 5, batch=2)
        with count_waits() as waits:
            ask(make_trainer(device, []), trained.module, train, trained.queries)
        found.append(Counter(waits.places))
    return sorted((found[1] - found[0]).elements())


# Options, and how many passes over the training data there are at most.
QUESTIONS = {
    "identity": ({"method": "identity"}, 1),
    "diagonal": ({"method": "diagonal"}, 2),
    "factors and scores": ({"method": "ekfac"}, 2),
    "two passes for factors": ({"method": "ekfac", "memory_budget": 2**12}, 3),
    "top k": ({"method": "identity", "top_k": 3}, 1),
    "groups": ({"method": "identity", "train_groups": "thirds"}, 1),
    "mean query by layer": ({"method": "identity", "aggregate": "mean", "by": "layer"}, 1),
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_passes(trained, device, name):
    """What leaves the device is waited for together, once in 16 batches or at the end of the pass."""
    options, passes = QUESTIONS[name]

    def ask(trainer, module, train, queries):
        own = dict(options)
        if "train_groups" in own:
            own["train_groups"] = [number % 3 for number in range(len(train.dataset))]
        trainer.influence(module, train, queries, **own)

    places = growth_of_a_question(trained, device, ask)
    assert len(places) <= passes, places


def test_self_influence(trained, device):
    def ask(trainer, module, train, queries):
        trainer.self_influence(module, train, method="identity")

    places = growth_of_a_question(trained, device, ask)
    assert len(places) <= 1, places


@pytest.mark.slow
def test_products(trained, device):
    """An iteration waits once or twice a step, which is a whole pass, to see who is solved: not a batch."""

    def ask(trainer, module, train, queries):
        options = {"method": "cg", "max_steps": 1, "tolerance": 1e-12, "memory_budget": 2**10}
        options["layers"] = ["net.head.4"]
        trainer.influence(module, train, queries, **options)

    places = growth_of_a_question(trained, device, ask)
    assert len(places) <= 6, "\n".join(places)
