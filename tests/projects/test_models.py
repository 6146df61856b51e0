"""Tiny random models of published packages, unchanged: fit with the callback, then answers against autograd.

``pip install -e ".[test,projects]" && python -m pytest -m projects tests/projects``. Nothing is downloaded.
"""

import copy

import lightning.pytorch as pl
import peft
import pytest
import timm
import torch
import torchvision
import transformers as tf
from drive import mute
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from lightning_influence import InfluenceCallback
from lightning_influence.model.layers.plan import find_layers

pytestmark = pytest.mark.projects

COUNT, QUERIES, WORDS, LENGTH = 12, 5, 50, 7
# Of the examples' squared gradient, and of the scores in float32.
LEAST_SHARE, MOST_ERROR = 0.999, 1e-5


class Examples(Dataset):
    """Rows of equal tensors, as dictionaries or as pairs."""

    def __init__(self, **columns):
        self.columns = columns

    def __len__(self):
        return COUNT

    def __getitem__(self, n):
        return {name: column[n] for name, column in self.columns.items()}


class Language(pl.LightningModule):
    """What a user writes around a model of transformers, which computes its loss itself."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, batch_idx):
        loss = self.model(**batch).loss
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-3)


class Images(Language):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.model(batch["x"]), batch["y"])


def text():
    words = torch.randint(3, WORDS, (COUNT, LENGTH))
    return Examples(input_ids=words, labels=words.clone())


def sentences():
    words, lengths = torch.randint(3, WORDS, (COUNT, LENGTH)), 3 + torch.arange(COUNT) % (LENGTH - 2)
    mask = torch.arange(LENGTH) < lengths[:, None]
    return Examples(
        input_ids=words.masked_fill(~mask, 0), attention_mask=mask.long(), labels=torch.arange(COUNT) % 3
    )


def pixels(channels=1, size=8, names=("pixel_values", "labels")):
    images = torch.randn(COUNT, channels, size, size)
    return Examples(**{names[0]: images, names[1]: torch.arange(COUNT) % 3})


def pictures(size=32):
    return pixels(3, size, ("x", "y"))


COMMON = {"vocab_size": WORDS, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def llama(**options):
    return tf.LlamaForCausalLM(tf.LlamaConfig(num_key_value_heads=1, **SMALL, **COMMON, **options))


def lora():
    options = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    return peft.get_peft_model(llama(), peft.LoraConfig(**options))


def gpt():
    return tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=16, **COMMON))


def t5():
    config = tf.T5Config(
        vocab_size=WORDS, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return tf.T5ForConditionalGeneration(config)


def vision():
    config = tf.ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=3, **SMALL)
    return tf.ViTForImageClassification(config)


CASES = {
    "GPT-2": lambda: (Language(gpt()), text()),
    "BERT": lambda: (
        Language(tf.BertForSequenceClassification(tf.BertConfig(num_labels=3, vocab_size=WORDS, **SMALL))),
        sentences(),
    ),
    "T5": lambda: (Language(t5()), text()),
    "Llama": lambda: (Language(llama()), text()),
    "Llama, tied": lambda: (Language(llama(tie_word_embeddings=True)), text()),
    "ViT": lambda: (Language(vision()), pixels()),
    "LoRA": lambda: (Language(lora()), text()),
    "torchvision ResNet": lambda: (Images(torchvision.models.resnet18(num_classes=3)), pictures()),
    "torchvision ViT": lambda: (
        Images(
            torchvision.models.VisionTransformer(
                image_size=32,
                patch_size=8,
                num_layers=2,
                num_heads=2,
                hidden_dim=16,
                mlp_dim=32,
                num_classes=3,
            )
        ),
        pictures(),
    ),
    "timm ConvNeXt": lambda: (Images(timm.create_model("convnextv2_atto", num_classes=3)), pictures()),
    "timm MLP-Mixer": lambda: (
        Images(
            timm.models.MlpMixer(num_classes=3, img_size=32, patch_size=8, num_blocks=2, embed_dim=16),
        ),
        pictures(),
    ),
}


def fit(module, data, callbacks, tmp_path):
    pl.seed_everything(1)
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=callbacks, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, DataLoader(data, batch_size=4, shuffle=True))
    return trainer


def differentiate(module, data):
    """Gradients of each example alone, by name."""
    names = [name for name, p in module.named_parameters() if p.requires_grad]
    parameters = [p for p in module.parameters() if p.requires_grad]
    mute(module).eval()
    rows = []
    for n in range(len(data)):
        loss = module.training_step(default_collate([data[n]]), 0)
        rows.append(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))
    return {
        name: torch.stack(column).flatten(1).double()
        for name, column in zip(names, zip(*rows, strict=True), strict=True)
    }


def covered_names(module, layers):
    """Names of the parameters in some blocks."""
    plan = find_layers(module)
    blocks = [plan.layers[name] for name in layers]
    kept = {id(p) for b in blocks for p in (b.rule.weight(b.module), b.rule.bias(b.module)) if p is not None}
    return {name for name, p in module.named_parameters() if id(p) in kept and p.requires_grad}


@pytest.mark.parametrize("name", CASES)
def test_a_published_model_answers_as_it_is(name, tmp_path):
    pl.seed_everything(0)
    plain, data = CASES[name]()
    module = copy.deepcopy(plain)
    fit(plain, data, [], tmp_path)
    trainer = fit(module, data, [InfluenceCallback()], tmp_path)
    assert all(
        torch.equal(a, b)
        for a, b in zip(plain.state_dict().values(), module.state_dict().values(), strict=True)
    )
    loaders = DataLoader(data, batch_size=4), DataLoader(Subset(data, range(QUERIES)), batch_size=4)
    identity = trainer.influence(module, *loaders, method="identity")
    damped = trainer.influence(module, *loaders, method="ekfac", damping=1e6)
    square = trainer.influence(module, loaders[0], loaders[0], method="ekfac").scores.double()

    gradients = differentiate(module, data)
    kept = covered_names(module, identity.diagnostics.layers)
    rows = torch.cat([gradients[name] for name in gradients if name in kept], 1)
    whole = torch.cat(list(gradients.values()), 1)
    assert rows.square().sum() >= LEAST_SHARE * whole.square().sum()
    expected = rows[:QUERIES] @ rows.T / COUNT
    for scores in (identity.scores.double(), damped.scores.double() * 1e6):
        assert (scores - expected).norm() <= MOST_ERROR * expected.norm()
    # Influence on each other is mutual, and on itself positive.
    assert (square - square.T).norm() <= 1e-4 * square.norm()
    assert torch.linalg.eigvalsh((square + square.T) / 2).min() >= -1e-4 * square.norm()
