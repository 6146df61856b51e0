"""What steps, datasets and collate functions draw: the same in every pass, and the user's generators stay."""

import functools
import itertools
import random
import warnings

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset, default_collate

from lightning_influence import InfluenceModule, InfluenceWarning

N, BATCH = 24, 8
INPUTS = torch.randn(N, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.arange(N) % 3


class Net(LightningModule):
    def __init__(self, augment=lambda x: x):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.augment = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double(), augment

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(self.augment(batch[0])), batch[1])


def gradients(module, inputs):
    parameters, rows = list(module.parameters()), []
    for x, y in zip(inputs, LABELS, strict=True):
        loss = nn.functional.cross_entropy(module.net(x[None]), y[None])
        rows.append(torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)]))
    return torch.stack(rows)


def ask(module, data, **options):
    """Return the answer of a loader to itself, and what was warned of."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        train, queries = (DataLoader(data, BATCH, **options) for _ in range(2))
        answer = InfluenceModule(module).scores(train, queries, method="identity")
    return answer, [str(w.message) for w in told if issubclass(w.category, InfluenceWarning)]


DRAWS = {
    "torch": lambda: torch.rand(()) < 0.5,
    "numpy": lambda: np.random.rand() < 0.5,
    "python": lambda: random.random() < 0.5,
}


@pytest.mark.grid
@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("seed", range(4))
def test_a_batch_has_one_coin_in_all_passes(draw, seed):
    module = Net(lambda x: x.flip(1) if DRAWS[draw]() else x)
    torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
    answer, told = ask(module, TensorDataset(INPUTS, LABELS))
    plain, flipped = gradients(module, INPUTS), gradients(module, INPUTS.flip(1))
    errors = []
    for coins in itertools.product((False, True), repeat=N // BATCH):
        rows = torch.tensor(coins).repeat_interleave(BATCH)[:, None]
        mixed = torch.where(rows, flipped, plain)
        errors.append(float((answer.scores.double() - mixed @ mixed.T / N).abs().max()))
    assert min(errors) < 1e-6
    assert any("draws noise" in note for note in told)
    assert list(answer.diagnostics.warnings) == told


class Augmented(Dataset):
    """Adds what its own attribute draws."""

    def __init__(self, generator, draw, count=N):
        self.transforms = [{"noise": type("Noise", (), {})()}]
        self.transforms[0]["noise"].generator = generator
        self.draw, self.count = draw, count

    def __len__(self):
        return self.count

    def __getitem__(self, n):
        return INPUTS[n] + self.draw(self.transforms[0]["noise"].generator), LABELS[n]


GENERATORS = {
    "numpy": (lambda: np.random.default_rng(0), lambda g: torch.from_numpy(g.standard_normal(5))),
    "legacy": (lambda: np.random.RandomState(0), lambda g: torch.from_numpy(g.randn(5))),
    "python": (lambda: random.Random(0), lambda g: torch.tensor([g.gauss(0, 1) for _ in range(5)]).double()),
    "torch": (lambda: torch.Generator().manual_seed(0), lambda g: torch.randn(5, generator=g).double()),
}
WRAPPED = {"alone": lambda data: data, "joined": lambda data: Subset(ConcatDataset([data]), range(N))}


@pytest.mark.grid
@pytest.mark.parametrize("kind", GENERATORS)
@pytest.mark.parametrize("wrapped", WRAPPED)
def test_a_datasets_own_generator_is_put_back(kind, wrapped):
    make, draw = GENERATORS[kind]
    generator, fresh = make(), make()
    module = Net()
    answer, told = ask(module, WRAPPED[wrapped](Augmented(generator, draw)))
    assert not told
    assert not answer.diagnostics.warnings
    noise = [draw(fresh) for _ in range(N)]  # from the user's state on, in the order of the loader
    found = gradients(module, INPUTS + torch.stack(noise))
    torch.testing.assert_close(answer.scores.double(), found @ found.T / N, rtol=1e-5, atol=1e-7)
    assert torch.equal(draw(generator), draw(make()))


def add_noise(generator, items):
    inputs, labels = default_collate(items)
    return inputs + torch.randn(inputs.shape, generator=generator).double(), labels


def test_a_collate_functions_own_generator_is_put_back():
    generator, module = torch.Generator().manual_seed(0), Net()
    collate = functools.partial(add_noise, generator)
    answer, _ = ask(module, TensorDataset(INPUTS, LABELS), collate_fn=collate)
    fresh = torch.Generator().manual_seed(0)
    assert torch.equal(generator.get_state(), fresh.get_state())
    noise = torch.cat([torch.randn(BATCH, 5, generator=fresh) for _ in range(N // BATCH)]).double()
    found = gradients(module, INPUTS + noise)
    torch.testing.assert_close(answer.scores.double(), found @ found.T / N, rtol=1e-5, atol=1e-7)


def test_draws_do_not_depend_on_the_batches_before():
    """Global augmentations, read in another thing's midst: a loader of the last batches has the same ones."""
    noisy = Augmented(None, lambda _: torch.randn(5).double())
    module, values = Net(lambda x: x + torch.randn_like(x)), []
    for queries in (noisy, Subset(noisy, range(N))):
        torch.manual_seed(1)
        answer, _ = ask(module, queries)
        values.append(answer.scores)
    torch.testing.assert_close(values[0], values[0].T, rtol=1e-6, atol=1e-9)
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InfluenceWarning)
        chosen = DataLoader(noisy, BATCH, sampler=torch.utils.data.SubsetRandomSampler(range(BATCH, N)))
        last = InfluenceModule(module).scores(DataLoader(noisy, BATCH), chosen, method="identity")
    torch.testing.assert_close(last.scores, values[0][BATCH:], rtol=1e-6, atol=1e-9)


class Counting(Augmented):
    """Makes other examples each time that it is read, by a state that is no generator."""

    def __init__(self):
        super().__init__(None, None)
        self.calls = 0

    def __getitem__(self, n):
        self.calls += 1
        return INPUTS[n] * (1 + self.calls // N), LABELS[n]


def test_examples_that_come_out_otherwise_are_told_with_the_difference():
    answer, told = ask(Net(), Counting())
    # Twice the numbers in the second pass: by the norm of what they were, over labels that stay.
    size = torch.cat([INPUTS[:BATCH].flatten(), LABELS[:BATCH].double()]).norm()
    assert len(told) == 1
    assert f"another by {float(INPUTS[:BATCH].norm() / size):.2g} " in told[0]
    assert list(answer.diagnostics.warnings) == told
