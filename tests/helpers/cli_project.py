"""A user's project with a LightningCLI: a module, its data, and a subclass that links their arguments."""

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

QUERIES = 6


class Classifier(LightningModule):
    def __init__(self, features: int = 4, width: int = 8, lr: float = 0.1):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(features, width), nn.ReLU(), nn.Linear(width, 3))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)


class Points(LightningDataModule):
    """Points with three classes, split into training data and queries."""

    def __init__(self, features: int = 4, examples: int = 40, batch_size: int = 8):
        super().__init__()
        self.features, self.examples, self.batch_size = features, examples, batch_size

    def setup(self, stage):
        generator = torch.Generator().manual_seed(0)
        points = torch.randn(self.examples + QUERIES, self.features, generator=generator)
        data = TensorDataset(points, points[:, :3].argmax(1))
        self.train, self.queries = random_split(data, [self.examples, QUERIES], generator)

    def train_dataloader(self):
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.queries, self.batch_size)


class BrokenPoints(Points):
    def train_dataloader(self):
        raise ValueError("the user's own mistake")


class LinkedCLI(LightningCLI):
    def add_arguments_to_parser(self, parser):
        parser.add_argument("--note", type=str, default="none")
        parser.link_arguments("data.features", "model.features")


def squared_margin(module, batch):
    return module.net(batch[0]).pow(2).sum(1)
