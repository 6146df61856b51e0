"""Data and models of ``digits.py``, written as for any Lightning project: nothing here knows of influence."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

Batch = tuple[Tensor, Tensor]


class DigitsData(LightningDataModule):
    """scikit-learn's 8 x 8 digits: 1617 for training, with a share of the labels flipped, 180 for testing.

    Args:
        flipped: share of the training labels that is replaced by another class.
        seed: of the flips.
    """

    def __init__(self, flipped: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        digits = load_digits()
        parts = train_test_split(digits.images / 16.0, digits.target, test_size=0.1, random_state=0)
        train_images, test_images = (torch.tensor(part, dtype=torch.float32)[:, None] for part in parts[:2])
        train_labels, test_labels = (torch.tensor(part) for part in parts[2:])
        generator = torch.Generator().manual_seed(seed)
        self.is_flipped = torch.zeros(len(train_labels), dtype=torch.bool)
        self.is_flipped[
            torch.randperm(len(train_labels), generator=generator)[: round(flipped * len(train_labels))]
        ] = True
        shift = torch.randint(1, 10, (len(train_labels),), generator=generator)
        labels = torch.where(self.is_flipped, (train_labels + shift) % 10, train_labels)
        self.train_set = TensorDataset(train_images, labels)
        self.test_set = TensorDataset(test_images, test_labels)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled batches; influence passes go through the same dataset in order."""
        return DataLoader(self.train_set, batch_size=32, shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        """The test images, to watch the training."""
        return DataLoader(self.test_set, batch_size=180)

    def predict_dataloader(self) -> DataLoader[Batch]:
        """The test images, to find those that are worth a question."""
        return self.val_dataloader()


class Classifier(LightningModule):
    """Cross-entropy and SGD on top of a network of the subclasses."""

    net: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = MulticlassAccuracy(num_classes=10, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Logits, ``(B, 10)``."""
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The batch's mean cross-entropy."""
        images, labels = batch
        loss = nn.functional.cross_entropy(self(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the accuracy."""
        images, labels = batch
        self.accuracy(self(images), labels)
        self.log("accuracy", self.accuracy, prog_bar=True)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Probabilities, ``(B, 10)``."""
        return self(batch[0]).softmax(dim=1)

    def configure_optimizers(self) -> dict[str, object]:
        """SGD with momentum and weight decay, its learning rate falling to zero."""
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class MLP(Classifier):
    """64-64-32-10 with GELU."""

    def __init__(self) -> None:
        super().__init__()
        hidden = (nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 32), nn.GELU())
        self.net = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(32, 10))


class CNN(Classifier):
    """Two convolutions and two linear layers, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        first = (nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        second = (nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.1))
        self.net = nn.Sequential(*first, *second, nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
