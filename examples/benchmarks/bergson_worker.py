"""bergson 2.5.1 on the language models: EK-FAC, and EK-FAC refined by CG. Runs in an environment of its own.

It takes causal language models of Hugging Face: the network stands in the shell of one, with the same
parameters and logits. It has no self-influence.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any, ClassVar

import torch
from bergson.build import build_query
from bergson.config.config import (
    AstraConfig,
    DataConfig,
    HessianConfig,
    HessianPipelineConfig,
    IndexConfig,
    InversionConfig,
    PreprocessConfig,
    QuerySetConfig,
    ScoreConfig,
)
from bergson.data import load_scores
from bergson.hessians.apply_hessian import EkfacConfig, apply_worker
from bergson.hessians.hessian_approximations import approximate_hessians
from bergson.hessians.pipeline import _run_astra
from bergson.score.score import score_dataset
from datasets import Dataset, disable_progress_bars
from meter import Stage, TensorTable
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import CausalLMOutput
from worker import Job, Peer, UnansweredError, main

# The network of the one job of this process: a shell is built from its name alone.
NETS: dict[str, nn.Module] = {}


class ShellConfig(PretrainedConfig):
    """Configuration of :class:`Shell`."""

    model_type = "benchmark_shell"


class Shell(PreTrainedModel):
    """A network of ``(B, T)`` tokens to logits as a causal language model of sequences of ``T + 1``.

    Its layers see the last token too, as bergson wants; what they say of it predicts nothing.
    """

    config_class = ShellConfig
    base_model_prefix = ""  # it is its own base: the head is watched as well

    def __init__(self, config: ShellConfig) -> None:
        super().__init__(config)
        self.net = deepcopy(NETS["net"])
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Leave weights as they are."""

    def get_input_embeddings(self) -> nn.Module:
        """The embedding of tokens."""
        return self.net.token

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.net.head

    def forward(self, input_ids: Tensor, **_: Any) -> CausalLMOutput:
        """Return logits of each next token."""
        return CausalLMOutput(logits=self.net(input_ids))


def _lengthen(net: nn.Module) -> nn.Module:
    """Return a copy of a network with learned places that has one more."""
    longer = deepcopy(net)
    weight = nn.functional.pad(net.place.weight.detach(), (0, 0, 0, 1))
    longer.place = nn.Embedding.from_pretrained(weight, freeze=False)
    return longer


AutoConfig.register("benchmark_shell", ShellConfig)
AutoModelForCausalLM.register(ShellConfig, Shell)


def _write_table(table: TensorTable, path: Path) -> str:
    inputs, targets = table.tensors
    rows = torch.cat([inputs, targets[:, -1:]], dim=1).tolist()
    Dataset.from_dict({"input_ids": rows, "length": [len(row) for row in rows]}).save_to_disk(str(path))
    return str(path)


class EKFAC(Peer):
    """EK-FAC from sampled labels; its default damping is a tenth of the mean eigenvalue."""

    name: ClassVar[str] = "bergson"
    untuned: ClassVar[str] = "damping 0.1 of the mean eigenvalue"
    dampings: ClassVar[tuple[float, ...]] = (0.1, 1.0, 1e-2, 1e-3)
    steps: ClassVar[int] = 0

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        if not job.tokens:
            raise UnansweredError("answers for causal language models of Hugging Face alone")
        if not torch.equal(job.train.tensors[0][:, 1:], job.train.tensors[1][:, :-1]):
            raise UnansweredError("labels are not the next tokens")
        NETS["net"] = _lengthen(job.net)
        folder, vocabulary = job.scratch, job.net.token.num_embeddings
        shell = Shell(ShellConfig())
        shell.save_pretrained(folder / "model")
        words = WordLevel({str(k): k for k in range(vocabulary)}, unk_token="0")
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="0", pad_token="0")
        tokenizer.save_pretrained(folder / "model")
        self.data = DataConfig(dataset=_write_table(job.train, folder / "train"))
        self.queries = QuerySetConfig(dataset=_write_table(job.queries, folder / "queries"))
        self.hessian = HessianConfig(method="kfac", ev_correction=True)
        self.found: dict[str, Tensor] = {}
        with torch.no_grad():  # What it loads is what was trained.
            inputs, targets = job.train.tensors[0][:2], job.train.tensors[1][:2]
            whole = torch.cat([inputs, targets[:, -1:]], dim=1)
            loaded = AutoModelForCausalLM.from_pretrained(folder / "model")
            torch.testing.assert_close(loaded(whole).logits[:, :-1], job.net(inputs))

    def _config(self, path: str) -> IndexConfig:
        length = self.job.train.tensors[0].shape[1] + 1
        return IndexConfig(
            run_path=str(self.job.scratch / path),
            overwrite=True,
            model=str(self.job.scratch / "model"),
            data=self.data,
            token_batch_size=self.job.pass_batch * length,
            include_bias=True,
            loss_reduction="mean",
            force_math_sdp=self.steps > 0,  # CG differentiates attention twice
        )

    def _clear(self, *paths: str) -> None:
        for path in paths:
            for name in (path, f"{path}.part"):
                shutil.rmtree(self.job.scratch / name, ignore_errors=True)

    def _factors(self, count: int) -> None:
        self._clear("hessian/kfac")
        with _quiet():
            approximate_hessians(self._config("hessian/kfac"), self.hessian)

    def _pairs(self, damping: float) -> None:
        self._clear("query", "transformed", "refined", "scores")
        inversion = InversionConfig(damping_factor=damping, apply_batch_size=len(self.job.queries))
        folder = self.job.scratch
        with _quiet():
            build_query(self._config("query"), self.queries, PreprocessConfig())
            apply = EkfacConfig(
                hessian_method_path=str(folder / "hessian/kfac"),
                gradient_path=str(folder / "query"),
                run_path=str(folder / "transformed"),
                ev_correction=True,
                apply_batch_size=len(self.job.queries),
            )
            apply_worker(0, 0, 1, apply, inversion)
            if self.steps:
                self._refine(inversion)
            query = str(folder / ("refined" if self.steps else "transformed"))
            score_dataset(self._config("scores"), ScoreConfig(query_path=query), PreprocessConfig())
        found = load_scores(folder / "scores")
        self.found[f"damping {damping:g} of the mean eigenvalue"] = torch.tensor(found[:].copy()).float().T

    def _refine(self, inversion: InversionConfig) -> None:
        size = len(self.job.train)
        astra = AstraConfig(self.steps, "cg", batch_size=size, micro_batch_size=self.job.pass_batch)
        pipeline = HessianPipelineConfig(query=self.queries, inversion_cfg=inversion, astra=astra)
        config, folder = self._config("."), self.job.scratch
        config.run_path = str(folder)
        paths = (str(folder / name) for name in ("query", "transformed", "refined"))
        _run_astra(config, self.hessian, pipeline, *paths)

    def stages(self) -> list[Stage]:
        """Factors, and scores with the queries' gradients."""
        whole = (len(self.job.train),)
        return [
            Stage("factors", "factors", self._factors, whole),
            Stage("scores", "scores", lambda count: self._pairs(self.dampings[0]), whole),
        ]

    def scores(self) -> dict[str, Tensor]:
        """Scores of every damping, from the same factors."""
        for damping in self.dampings[1:]:
            self._pairs(damping)
        return self.found

    def settings(self) -> dict[str, str]:
        """Layers, batches, steps."""
        layers = {"layers": "linear", "batches": str(self.job.pass_batch)}
        return {**layers, "CG steps": str(self.steps)} if self.steps else layers


class CG(EKFAC):
    """EK-FAC refined by 10 steps of CG over the whole training set, a query at a time: its best method."""

    name: ClassVar[str] = "bergson-cg"
    dampings: ClassVar[tuple[float, ...]] = (0.1,)
    steps: ClassVar[int] = 10


@contextlib.contextmanager
def _quiet() -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        yield


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.simplefilter("ignore")
    disable_progress_bars()
    main({"ekfac": EKFAC, "cg": CG})
