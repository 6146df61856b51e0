"""Training steps of kinds that people train, unchanged, against one backward pass for each example."""

import copy

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.data import DataLoader, default_collate

from lightning_influence import InfluenceModule

N, SIZE = 7, 4
generator = torch.Generator().manual_seed(0)


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def integers(high, *shape):
    return torch.randint(high, shape, generator=generator)


class Step(LightningModule):
    """A module whose step is a function of parts that are its attributes."""

    def __init__(self, step, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.step = step
        self.double()
        self.eval()

    def training_step(self, batch, batch_idx):
        return self.step(self, *batch)


def segmentation():
    """A U-Net with classes that weigh, and pixels to ignore."""

    def block(before, after):
        conv = nn.Conv2d(before, after, 3, padding=1, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(after), nn.ReLU(inplace=True))

    def step(m, x, y):
        high = m.down(x)
        low = m.up(m.bottom(F.max_pool2d(high, 2)))
        return F.cross_entropy(m.head(m.join(torch.cat([high, low], 1))), y, m.weights, ignore_index=255)

    module = Step(
        step, down=block(1, 3), bottom=block(3, 4), up=nn.ConvTranspose2d(4, 3, 2, 2), join=block(6, 3),
        head=nn.Conv2d(3, 3, 1),
    )  # fmt: skip
    module.register_buffer("weights", torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64))
    labels = integers(3, N, 4, 4)
    labels[normal(N, 4, 4) < -1] = 255
    shares = torch.stack([module.weights[y[y != 255]].sum() for y in labels])
    return module, list(zip(normal(N, 1, 4, 4), labels, strict=True)), default_collate, shares / shares.mean()


def speech():
    """Frames of several lengths in packed sequences, and CTC."""

    def step(m, x, lengths, y, sizes):
        packed = pack_padded_sequence(m.frames(x), lengths.cpu(), batch_first=True, enforce_sorted=False)
        states, _ = pad_packed_sequence(m.recurrent(packed)[0], batch_first=True)
        return F.ctc_loss(m.head(states).log_softmax(-1).transpose(0, 1), y, lengths, sizes)

    def collate(items):
        frames, words = zip(*items, strict=True)
        lengths, sizes = (torch.tensor([len(part) for part in parts]) for parts in (frames, words))
        return nn.utils.rnn.pad_sequence(frames, batch_first=True), lengths, torch.cat(words), sizes

    module = Step(
        step, frames=nn.Linear(3, 4), recurrent=nn.LSTM(4, 3, bidirectional=True, batch_first=True),
        head=nn.Linear(6, 4),
    )  # fmt: skip
    sizes = zip(*(part.tolist() for part in (6 + integers(5, N), 1 + integers(2, N))), strict=True)
    items = [(normal(length, 3), 1 + integers(3, size)) for length, size in sizes]
    return module, items, collate, None


def autoencoder():
    """Variational, with sums over the batch that are divided by its size."""

    def step(m, x, noise):
        mean, spread = m.encode(x).chunk(2, 1)
        found = m.decode(mean + noise * (spread / 2).exp())
        reconstruction = F.binary_cross_entropy_with_logits(found, x, reduction="sum") / len(x)
        return reconstruction - 0.5 * (1 + spread - mean**2 - spread.exp()).sum(1).mean()

    module = Step(step, encode=nn.Linear(5, 4), decode=nn.Linear(2, 5))
    return module, list(zip(normal(N, 5).sigmoid(), normal(N, 2), strict=True)), default_collate, None


def masked_autoencoder():
    """Patches are picked by an order of their own in each example, and put back."""

    def step(m, x, noise):
        order = noise.argsort(1)
        back, wide = order.argsort(1), order[..., None].expand(-1, -1, 4)
        kept = m.encode(torch.gather(m.embed(x) + m.places, 1, wide[:, :2]))
        full = torch.cat([kept, m.hole.expand(len(x), 4, -1)], 1)
        found = m.decode(torch.gather(full, 1, back[..., None].expand(-1, -1, 4)) + m.places)
        hidden = (back >= 2).double()
        return ((found - x).square().mean(-1) * hidden).sum() / hidden.sum()

    module = Step(
        step, embed=nn.Linear(3, 4), places=nn.Parameter(normal(1, 6, 4)), hole=nn.Parameter(normal(1, 1, 4)),
        encode=nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True), decode=nn.Linear(4, 3),
    )  # fmt: skip
    return module, list(zip(normal(N, 6, 3), normal(N, 6), strict=True)), default_collate, None


def detection():
    """Lists of images of several sizes and of boxes, as ``zip(*examples)`` makes them."""

    def step(m, images, targets):
        losses = []
        for image, target in zip(images, targets, strict=True):
            features = m.body(image[None]).relu()
            losses.append(F.cross_entropy(m.classes(features.mean((2, 3))), target["label"][None]))
            boxes = m.boxes(features).flatten(2)[0].T[: len(target["boxes"])]
            losses.append(F.smooth_l1_loss(boxes, target["boxes"], reduction="sum"))
        return sum(losses) / len(images)

    module = Step(step, body=nn.Conv2d(1, 3, 3), classes=nn.Linear(3, 2), boxes=nn.Conv2d(3, 4, 1))
    sizes = (1 + integers(3, N)).tolist()
    items = [
        (normal(1, 4 + size, 5), {"boxes": normal(size, 4), "label": integers(2, 1)[0]}) for size in sizes
    ]
    return module, items, lambda items: tuple(zip(*items, strict=True)), None


def triplets():
    """Three views of each example in one call of the network."""

    def step(m, *views):
        return F.triplet_margin_loss(*m.net(torch.cat(views)).chunk(3))

    items = list(zip(normal(N, 4), normal(N, 4), normal(N, 4), strict=True))
    return Step(step, net=nn.Linear(4, 3)), items, default_collate, None


def experts():
    """Each example goes to two of three experts, with weights of a router."""

    def step(m, x, y):
        weights, chosen = m.router(x).softmax(1).topk(2, 1)
        found = torch.zeros(len(x), 5, dtype=x.dtype)
        for number, expert in enumerate(m.experts):
            rows, place = (chosen == number).nonzero(as_tuple=True)
            if len(rows):
                found.index_add_(0, rows, weights[rows, place, None] * expert(x[rows]))
        return F.cross_entropy(m.head(found.relu()), y)

    layers = nn.ModuleList(nn.Linear(4, 5) for _ in range(3))
    module = Step(step, router=nn.Linear(4, 3), experts=layers, head=nn.Linear(5, 2))
    return module, list(zip(normal(N, 4), integers(2, N), strict=True)), default_collate, None


def codebook():
    """A vector-quantised autoencoder, whose gradients go straight through the choice of a code."""

    def step(m, x):
        hidden = m.encode(x)
        codes = m.book(torch.cdist(hidden, m.book.weight).argmin(1))
        taken = hidden + (codes - hidden).detach()
        terms = F.mse_loss(codes, hidden.detach()) + 0.25 * F.mse_loss(hidden, codes.detach())
        return F.mse_loss(m.decode(taken), x) + terms

    module = Step(step, encode=nn.Linear(5, 3), book=nn.Embedding(4, 3), decode=nn.Linear(3, 5))
    return module, [(x,) for x in normal(N, 5)], default_collate, None


def bootstrap():
    """A target network, which each step moves towards the trained one."""

    def step(m, first, second):
        with torch.no_grad():
            for own, moving in zip(m.online.parameters(), m.target.parameters(), strict=True):
                moving.lerp_(own, 0.1)
            wanted = m.target(second)
        return 2 - 2 * F.cosine_similarity(m.predict(m.online(first)), wanted).mean()

    online = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.ReLU(), nn.Linear(5, 3))
    target = copy.deepcopy(online).requires_grad_(False)
    module = Step(step, online=online, target=target, predict=nn.Linear(3, 3))
    return module, list(zip(normal(N, 4), normal(N, 4), strict=True)), default_collate, None


KINDS = (
    segmentation, speech, autoencoder, masked_autoencoder, detection, triplets, experts, codebook, bootstrap
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:The training loss has no second derivatives")
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_one_backward_pass_for_each_example(kind):
    generator.manual_seed(0)
    torch.manual_seed(0)
    module, items, collate, weights = kind()
    state = copy.deepcopy(module.state_dict())
    loader = DataLoader(items, SIZE, collate_fn=collate)
    found = InfluenceModule(module).scores(loader, loader, method="identity")
    assert found.diagnostics.parameters_covered == 1
    parameters, rows = [p for p in module.parameters() if p.requires_grad], []
    for item in items:
        module.load_state_dict(state)
        loss = module.training_step(collate([item]), 0)
        grads = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([grad.flatten() for grad in grads]))
    own = torch.stack(rows) * (1 if weights is None else weights[:, None])
    torch.testing.assert_close(found.scores, own @ own.T / N)


class Diffusion(Step):
    """Times and noise are drawn in the step; what was drawn for a batch can be given again."""

    def __init__(self):
        super().__init__(None, times=nn.Embedding(5, 2), net=nn.Linear(5, 3))
        self.drawn, self.given = [], None

    def training_step(self, batch, batch_idx):
        [x] = batch
        drawn = self.given or (torch.randint(5, (len(x),)), torch.randn_like(x))
        if self.given is None:
            DRAWN.append((x.tolist(), drawn))
        share = 0.1 + 0.2 * drawn[0][:, None]
        mixed = share.sqrt() * x + (1 - share).sqrt() * drawn[1]
        return F.mse_loss(self.net(torch.cat([mixed, self.times(drawn[0])], 1)), drawn[1])


DRAWN = []


def test_noise_of_the_step_is_that_of_one_draw():
    torch.manual_seed(0)
    DRAWN.clear()
    module, data, queries = Diffusion(), normal(SIZE, 3), normal(3, 3)
    with pytest.warns(match="scores are those of one draw"):
        found = InfluenceModule(module).scores([(data,)], [(queries,)], method="identity").scores

    def gradients(x):
        """The gradients at the first draw: what comes after it are checks."""
        times, noise = next(drawn for seen, drawn in DRAWN if seen == x.tolist())
        for n in range(len(x)):
            module.given = times[n : n + 1], noise[n : n + 1]
            grads = torch.autograd.grad(module.training_step((x[n : n + 1],), 0), list(module.parameters()))
            yield torch.cat([grad.flatten() for grad in grads])

    own, asked = (torch.stack(list(gradients(x))) for x in (data, queries))
    torch.testing.assert_close(found, asked @ own.T / SIZE)
