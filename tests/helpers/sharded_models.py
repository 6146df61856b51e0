"""A module that ``fully_shard`` spreads over processes, and Trainers that do so on the CPU."""

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

try:
    from torch.distributed.fsdp import fully_shard
except ImportError:  # before torch 2.6
    from torch.distributed._composable.fsdp import fully_shard

OFF = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)


class Reader(pl.LightningModule):
    """Layers that are called, one that is not, and parameters outside of layers; some groups of shards."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm = nn.Embedding(9, 4), nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.conv = nn.Conv1d(4, 6, 3, padding=1)
        self.rnn, self.head = nn.GRU(6, 5, batch_first=True), nn.Linear(5, 3)
        self.double()

    def configure_model(self):
        if self._device_mesh is not None and not hasattr(self, "unshard"):
            mesh = self.device_mesh["data_parallel"]
            for part in (self.embed, self.attention, self.rnn, self.head):
                fully_shard(part, mesh=mesh)
            fully_shard(self, mesh=mesh)

    def forward(self, words):
        x = self.norm(self.embed(words))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = torch.relu(self.conv(x.transpose(1, 2)).transpose(1, 2))
        states, _ = self.rnn(x)
        return self.head(states[:, -1])

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


class Narrow(Reader):
    """Few layers, for what is about processes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.attention = nn.Linear(4, 6).double(), nn.Tanh()
        self.norm = self.conv = self.rnn = nn.Identity()
        self.head = nn.Linear(6, 3).double()

    def configure_model(self):
        if self._device_mesh is not None and not hasattr(self, "unshard"):
            mesh = self.device_mesh["data_parallel"]
            for part in (self.embed, self.head, self):  # nothing is left to the last one
                fully_shard(part, mesh=mesh)

    def forward(self, x):
        return self.head(self.attention(self.embed(x)))


def make_words(count):
    """Sequences of words with labels, the same in every process."""
    torch.manual_seed(1)
    return TensorDataset(torch.randint(9, (count, 6)), torch.arange(count) % 3)


def make_vectors(count):
    """Vectors with labels, the same in every process."""
    torch.manual_seed(1)
    return TensorDataset(torch.randn(count, 4, dtype=torch.float64), torch.arange(count) % 3)


def make_trainer(kind, folder, processes=2, **options):
    """A Trainer that shards by FSDP2 over processes on the CPU."""
    strategy = ModelParallelStrategy(processes, 1, save_distributed_checkpoint=False)
    options |= {"accelerator": "cpu", "devices": processes, "default_root_dir": folder}
    return kind(strategy=strategy, **OFF, **options)


def make_whole(module):
    """The same module on one process, of which nothing is sharded."""
    state = {
        name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in module.state_dict().items()
    }
    whole = type(module)()
    whole.load_state_dict(state)
    return whole


def load(data, batch_size):
    """A loader in order."""
    return DataLoader(data, batch_size)
