import torch
from lightning.pytorch import LightningModule, seed_everything
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceCallback, InfluenceTrainer


class Classifier(LightningModule):
    """An ordinary LightningModule: nothing in it knows of influence."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return functional.cross_entropy(self(images), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


def quiet_trainer(kind=InfluenceTrainer, **settings):
    """A Trainer that writes nothing to the disk and shows no progress bar."""
    off = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet = {"enable_model_summary": False, "accelerator": "cpu", "max_epochs": 10, **off}
    return kind(**{**quiet, **settings})


seed_everything(0, verbose=False)
digits = load_digits()
order = torch.randperm(len(digits.target))
images = torch.tensor(digits.data / 16, dtype=torch.float32)[order]
labels = torch.tensor(digits.target)[order]
train_set, test_set = (TensorDataset(images[part], labels[part]) for part in (slice(600), slice(1757, 1797)))
train_loader = DataLoader(train_set, batch_size=32, shuffle=True)
test_loader = DataLoader(test_set, batch_size=40)

model = Classifier()
trainer = quiet_trainer(callbacks=[InfluenceCallback()])
trainer.fit(model, train_loader)
