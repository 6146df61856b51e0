"""Per-example gradients of every parameter of published models, unchanged, against automatic differentiation.

For each model, in float64 and eval mode: the number of trainable parameters whose per-example gradients
equal one backward pass for each example (relative error 1e-8, or 1e-5 where the model itself computes in
float32), the largest error over the largest gradient, how many parameters keep factors, the number of uses,
and whether the certificate finds all of them right without a slower way. Then the time, in float32, of a
watched forward pass, and of it with the per-example gradients of all parameters, over that of a plain
forward and backward pass.

Needs torchvision, transformers, peft and timm; the models are small and random, and nothing is downloaded:

    OMP_NUM_THREADS=1 python examples/benchmarks/models.py [part of a name ...]
"""

from __future__ import annotations

import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import peft
import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn
from torch.nn import functional

from lightning_influence.model.uses import Watch, Way, differentiate_losses, pull_gradients

B, MANY, WORDS, TIME = 4, 32, 50, 9
Loss = Callable[[nn.Module, Any], Tensor]
Case = tuple[Callable[[], nn.Module], Any, Loss]


def classify(outputs: Callable[[nn.Module, Tensor], Tensor]) -> Loss:
    """The cross-entropy of each example."""
    return lambda model, batch: functional.cross_entropy(outputs(model, batch[0]), batch[1], reduction="none")


def continue_text(outputs: Callable[[nn.Module, Tensor], Tensor]) -> Loss:
    """The mean cross-entropy of each example's next tokens."""

    def losses(model: nn.Module, batch: Any) -> Tensor:
        scores, targets = outputs(model, batch[0])[:, :-1], batch[0][:, 1:]
        flat = functional.cross_entropy(scores.flatten(0, 1), targets.flatten(), reduction="none")
        return flat.view(targets.shape).mean(1)

    return losses


def find_cases() -> Iterator[tuple[str, Case]]:
    """Yield names and cases."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(3, WORDS, (B, TIME), generator=generator)
    labels = torch.randint(0, 3, (B,), generator=generator)
    yield from (("Hugging Face " + name, case) for name, case in find_text(text, labels))
    sizes = {"vit": 32, "swin": 56, "mixer": 64, "coat": 64}
    grey = torch.randn(B, 1, 8, 8, generator=generator)
    image = torch.randn(B, 3, 32, 32, generator=generator)
    vit = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8,
        patch_size=4, num_channels=1, num_labels=3,
    )  # fmt: skip
    pixels = classify(lambda model, x: model(pixel_values=x).logits)
    yield "Hugging Face ViT", (lambda: transformers.ViTForImageClassification(vit), (grey, labels), pixels)
    plain = classify(lambda model, x: model(x))
    small = dict(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=3
    )
    yield (
        "torchvision ViT",
        (lambda: torchvision.models.VisionTransformer(**small), (image, labels), plain),
    )
    sequences = torch.randn(MANY, TIME, 32, generator=generator)
    classes = torch.randint(0, 3, (MANY,), generator=generator)
    for maker in (Distances, Cells, Projected):
        yield f"{MANY} examples: {maker.__name__}", (maker, (sequences, classes), plain)
    for name in ("resnet18", "swin_t", "convnext_tiny", "mobilenet_v3_small", "efficientnet_b0"):
        maker = getattr(torchvision.models, name)
        yield f"torchvision {name}", (lambda maker=maker: maker(num_classes=3), (image, labels), plain)
    for name in (
        "vit_tiny_patch16_224", "deit3_small_patch16_224", "beit_base_patch16_224", "cait_xxs24_224",
        "xcit_nano_12_p16_224", "swin_tiny_patch4_window7_224", "mixer_s32_224", "coatnet_nano_rw_224",
        "resnetv2_50x1_bit", "regnety_002", "convnextv2_atto", "efficientvit_b0",
    ):  # fmt: skip
        size = next((size for part, size in sizes.items() if part in name), 32)
        fixed = any(part in name for part in ("patch", "mixer", "coat", "cait", "xcit"))
        options = {"img_size": size} if fixed else {}
        batch = (torch.randn(B, 3, size, size, generator=generator), labels)
        yield (
            f"timm {name}",
            (
                lambda name=name, options=options: timm.create_model(name, num_classes=3, **options),
                batch,
                plain,
            ),
        )


class Distances(nn.Module):
    """Classes have prototypes, and distances to them by an operation that has no rule of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.prototypes = nn.Linear(32, 64), nn.Parameter(torch.randn(3, 64))

    def forward(self, x: Tensor) -> Tensor:
        """Return scores ``(B, 3)`` of sequences ``(B, T, 32)``."""
        return -torch.cdist(self.body(x).tanh(), self.prototypes.expand(len(x), -1, -1)).mean(1)


class Cells(nn.Module):
    """A recurrent cell that is called once for each position."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTMCell(32, 64), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores ``(B, 3)`` of sequences ``(B, T, 32)``."""
        state = None
        for position in x.unbind(1):
            state = self.cell(position, state)
        return self.head(state[0])


class Projected(nn.Module):
    """An LSTM whose hidden units are projected before they are given on."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(32, 64, proj_size=16, batch_first=True), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores ``(B, 3)`` of sequences ``(B, T, 32)``."""
        return self.head(self.rnn(x)[0][:, -1])


def find_text(text: Tensor, labels: Tensor) -> Iterator[tuple[str, Case]]:
    """Yield language models."""
    tf = transformers
    common = dict(vocab_size=WORDS, bos_token_id=1, eos_token_id=2)
    gpt = tf.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, n_positions=16, num_labels=3, pad_token_id=0, **common
    )
    llama = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, **common)
    bert = dict(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_labels=3
    )
    t5 = tf.T5Config(vocab_size=WORDS, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    logits = continue_text(lambda model, x: model(input_ids=x).logits)
    both = continue_text(lambda model, x: model(input_ids=x, decoder_input_ids=x).logits)
    sentence = classify(lambda model, x: model(input_ids=x).logits)

    def adapt(**options: Any) -> nn.Module:
        base = tf.LlamaForCausalLM(tf.LlamaConfig(num_key_value_heads=1, **llama))
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **options)
        return peft.get_peft_model(base, config)

    yield "GPT-2, tied", (lambda: tf.GPT2LMHeadModel(gpt), (text,), logits)
    yield "GPT-2 classifier", (lambda: tf.GPT2ForSequenceClassification(gpt), (text, labels), sentence)
    tied = tf.LlamaConfig(num_key_value_heads=1, tie_word_embeddings=True, **llama)
    yield "Llama, tied", (lambda: tf.LlamaForCausalLM(tied), (text,), logits)
    yield (
        "BERT",
        (
            lambda: tf.BertForSequenceClassification(tf.BertConfig(vocab_size=WORDS, **bert)),
            (text, labels),
            sentence,
        ),
    )
    distil = tf.DistilBertConfig(dim=16, hidden_dim=32, n_layers=2, n_heads=2, num_labels=3, vocab_size=WORDS)
    yield "DistilBERT", (lambda: tf.DistilBertForSequenceClassification(distil), (text, labels), sentence)
    yield "T5", (lambda: tf.T5ForConditionalGeneration(t5), (text,), both)
    yield "PEFT LoRA on Llama", (lambda: adapt(), (text,), logits)
    yield "PEFT DoRA on Llama", (lambda: adapt(use_dora=True), (text,), logits)


def check(model: nn.Module, batch: Any, loss_of: Loss) -> str:
    """Compare all per-example gradients with automatic differentiation."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with Watch(parameters, batch, len(batch[0])) as watch:
        losses = loss_of(model, batch)
    found = differentiate_losses(watch, losses)
    rows = [
        torch.autograd.grad(
            loss, list(parameters.values()), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        for loss in losses
    ]
    reference = {
        name: torch.stack(column) for name, column in zip(parameters, zip(*rows, strict=True), strict=True)
    }
    scale = max(float(grad.norm()) for grad in reference.values())
    worst, exact, factored = 0.0, 0, 0
    for name, grad in reference.items():
        own = found.gradients.get(name)
        error = float((grad if own is None else own.dense()[0] - grad).norm())
        limit = max(1e-8, 100 * watch.eps) * (float(grad.norm()) + 1e-6 * scale)
        exact += error <= limit
        worst = max(worst, error / scale)
        factored += own is not None and own.product() is not None
    slower = [
        name for name, report in found.report.parameters.items() if report.way not in (Way.USES, Way.UNUSED)
    ]
    return (
        f"{exact:4d} of {len(reference):4d}  {worst:8.1e}  {factored:4d}  {len(watch.uses):4d}  "
        f"{'yes' if not slower else 'not: ' + ', '.join(slower[:2]):4s}"
    )


def measure(model: nn.Module, batch: Any, loss_of: Loss, repeats: int = 5) -> tuple[float, float, float]:
    """Median seconds of a plain step, of a watched one, and of the latter with all pulled back."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    plain, watched, pulled = [], [], []
    for _ in range(repeats):
        start = time.perf_counter()
        torch.autograd.grad(loss_of(model, batch).sum(), list(parameters.values()), allow_unused=True)
        plain.append(time.perf_counter() - start)
        start = time.perf_counter()
        with Watch(parameters, batch, len(batch[0])) as watch:
            losses = loss_of(model, batch)
        watched.append(time.perf_counter() - start)
        pull_gradients(watch, losses.sum(), [None], keep_graph=False)
        pulled.append(time.perf_counter() - start)
    return tuple(statistics.median(times) for times in (plain, watched, pulled))


def main() -> None:
    """Print the table."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    wanted = sys.argv[1:]
    print(f"{'model':36s}  parameters exact  error  factored  uses  certified  forward, all (plain step = 1)")
    for name, (maker, batch, loss_of) in find_cases():
        if wanted and not any(part in name for part in wanted):
            continue
        torch.manual_seed(0)
        model = maker().eval()
        step, watched, pulled = measure(model, batch, loss_of)
        double = tuple(part.double() if part.is_floating_point() else part for part in batch)
        row = check(model.double(), double, loss_of)
        print(f"{name:36s}  {row}  {watched / step:5.2f} {pulled / step:5.2f}", flush=True)


if __name__ == "__main__":
    main()
