"""A folder in which a fit of factors keeps what it has finished, so that a killed one loses little.

Passes go over the training examples in parts: after each, the sums of every process are written to a file
of its own. Eigenbases are written layer by layer. Files are replaced atomically, and those of the part
before are removed when all processes have written theirs: whenever a process is killed, there is a part that
all have in full. Each file says what it was made for; those of another fit are not read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_influence.curvature.eigenbases import compute_eigenbasis
from lightning_influence.curvature.factors import Eigenbasis, Factors, LayerStatistics
from lightning_influence.methods.context import Context
from lightning_influence.model.content import SeenData
from lightning_influence.model.forward import Forward
from lightning_influence.support.digests import digest_tensors, digest_text
from lightning_influence.support.storage import PathLike, check_kind, load_tensors, save_tensors

# Chosen by hand: a killed fit loses at most this share of a pass, and the sums are written as often.
PARTS = 16
_SUMS, _BASIS, _GROUP = "sums of factors", "eigenbasis of a layer", "factors of a group of layers"


class FactorPass(Protocol):
    """A pass that sums factors."""

    factors: Factors
    forward: Forward

    def step(self, module: Any, batch: Any, indices: Tensor, dataloader_idx: int) -> None:
        """Add one batch."""
        ...


class FactorFolder:
    """What is finished of the factors of one model and data.

    Args:
        path: the folder, which is made if there is none.
        key: what the factors are fitted for; files with another one are not read.
        context: runs the passes.

    Attributes:
        restored: whether anything was read.
    """

    def __init__(self, path: PathLike, key: str, context: Context) -> None:
        self._path, self._key, self._context = Path(path).expanduser(), key, context
        self._path.mkdir(parents=True, exist_ok=True)
        self._parts = ""  # digest of the examples of each part, of the pass that runs
        self.restored = False

    def clear(self) -> None:
        """Remove what is there, whatever it was made for, once no process reads it."""
        self._meet()
        for file in sorted(self._path.glob("*.factors")):
            file.unlink(missing_ok=True)
        self._meet()

    def run(self, one_pass: FactorPass, name: str, losses: SeenData | None = None) -> None:
        """Run a pass over all training examples, from the first part that is not finished.

        Args:
            one_pass: the pass; it takes up the sums of the parts that are.
            name: of the pass, in the names of the files.
            losses: what it has seen, if it tells.
        """
        runner, train = self._context.runner, self._context.train
        parts = train.parts(-(-train.num_examples // min(PARTS, len(train))))
        # Batches of another size may make other parts, whose numbers say nothing of which examples were seen.
        self._parts = digest_tensors({str(number): part.indices for number, part in enumerate(parts)})
        done = self._agree(name, len(parts))
        if done:
            self._take_up(one_pass, self._file(name, done), losses)
        for number in range(done, len(parts)):
            runner.run(one_pass, parts[number])
            self._save(one_pass, name, number + 1, losses)
            self._meet()
            self._file(name, number).unlink(missing_ok=True)

    def decompose(self, name: str, layer: LayerStatistics, dtype: torch.dtype = torch.float64) -> Eigenbasis:
        """Return a layer's eigenbasis: the one that is kept, or one that is computed and kept.

        Args:
            name: of the layer.
            layer: its sums over all examples.
            dtype: precision of the decomposition.
        """
        file = self._basis_file(name)
        tensors = self._read(file, _BASIS)
        if tensors is None:
            basis = compute_eigenbasis(name, layer, dtype)
            save_tensors(file, basis.tensors(), {"kind": _BASIS, "key": self._key, "layer": name})
            return basis
        self.restored = True
        return (Eigenbasis.from_tensors(tensors[0]) or Eigenbasis()).to(layer.inputs.device)

    def keep_group(self, names: Sequence[str], factors: Factors, losses: SeenData) -> Factors:
        """Write the factors of a group of layers, and return them as they are read from the file.

        What the fit of the group kept on its way is removed.

        Args:
            names: of the layers.
            factors: fitted on all examples, of all processes.
            losses: what this process has seen.

        Returns:
            The factors, mapped from the file where they are on the CPU.
        """
        file, (tensors, plain) = self._group_file(names), _divide(factors)
        metadata = {"kind": _GROUP, "key": self._key, "state": plain, "losses": losses.numbers()}
        save_tensors(file, tensors, metadata)
        self._meet()
        runner = self._context.runner
        for pass_name in ("covariances", "squares"):
            for sums in self._path.glob(f"{pass_name}-{runner.rank}-*.factors"):
                sums.unlink(missing_ok=True)
        for name in names if runner.rank == 0 else ():
            self._basis_file(name).unlink(missing_ok=True)
        found = self._read(file, _GROUP, mapped=True)
        assert found is not None
        return self._build_group(*found)

    def find_group(self, names: Sequence[str]) -> tuple[Factors, SeenData] | None:
        """Return the factors of a group of layers and what this process has seen, if all have kept them."""
        found = self._read(self._group_file(names), _GROUP, mapped=True)
        everywhere = self._context.runner.all_gather_cat(torch.tensor([float(found is not None)])).min()
        if found is None or not bool(everywhere):
            return None
        self.restored, losses = True, SeenData()
        losses.restore(found[1]["losses"])
        return self._build_group(*found), losses

    def _build_group(self, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> Factors:
        return Factors.from_state_dict(metadata["state"] | tensors).to(self._context.device)

    def _basis_file(self, name: str) -> Path:
        # Another name than in versions whose bases had all columns, which other processes may not expect.
        return self._path / f"bases-{digest_text(name)}.factors"

    def _group_file(self, names: Sequence[str]) -> Path:
        return (
            self._path / f"group-{digest_text(json.dumps(list(names)))}-{self._context.runner.rank}.factors"
        )

    def _file(self, name: str, done: int) -> Path:
        return self._path / f"{name}-{self._context.runner.rank}-{done}.factors"

    def _agree(self, name: str, most: int) -> int:
        """Return the number of parts that all processes have finished."""
        own = [done for done in range(1, most + 1) if self._read(self._file(name, done), _SUMS) is not None]
        runner = self._context.runner
        return int(runner.all_gather_cat(torch.tensor([max(own, default=0)])).min())

    def _read(
        self, file: Path, kind: str, *, mapped: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return what a file holds, None if there is none or it was made for something else."""
        if not file.exists():
            return None
        tensors, metadata = load_tensors(file, mapped=mapped)
        check_kind(file, metadata, kind)
        fits = metadata.get("key") == self._key and metadata.get("parts", self._parts) == self._parts
        return (tensors, metadata) if fits else None

    def _save(self, one_pass: FactorPass, name: str, done: int, losses: SeenData | None) -> None:
        tensors, plain = _divide(one_pass.factors)
        # Bases are kept once; what a pass does not change need not be written again.
        kept = ("/squares",) if name == "squares" else ("/inputs", "/outputs")
        tensors = {key: value for key, value in tensors.items() if key.endswith(kept)}
        seen = None if losses is None else losses.numbers()
        metadata = {"kind": _SUMS, "key": self._key, "parts": self._parts, "state": plain, "losses": seen}
        save_tensors(self._file(name, done), tensors, metadata)

    def _take_up(self, one_pass: FactorPass, file: Path, losses: SeenData | None) -> None:
        found = self._read(file, _SUMS)
        assert found is not None
        tensors, metadata = found
        device, state, factors = self._context.device, metadata["state"], one_pass.factors
        for layer_name in state["layers"]:
            own = {key: tensors.get(f"{layer_name}/{key}") for key in ("inputs", "outputs", "squares")}
            examples, positions, squares_examples = state[f"{layer_name}/counts"]
            if own["inputs"] is not None and own["outputs"] is not None:
                factors.layers[layer_name] = LayerStatistics(
                    own["inputs"].to(device), own["outputs"].to(device), examples, positions
                )
            elif own["squares"] is not None:
                layer = factors.layers[layer_name]
                layer.squares, layer.squares_examples = own["squares"].to(device), squares_examples
        factors.fisher = state["fisher"]
        factors.weight_sum, factors.weight_examples = state["weight_sum"], state["weight_examples"]
        one_pass.forward.silent -= set(factors.layers)
        if losses is not None and metadata["losses"] is not None:
            losses.restore(metadata["losses"])
        self.restored = True

    def _meet(self) -> None:
        """Wait for all processes."""
        self._context.runner.all_reduce_sum(torch.zeros(1))


def _divide(factors: Factors) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of factors, and all else that they are restored from."""
    state = factors.state_dict()
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    return tensors, {key: value for key, value in state.items() if key not in tensors}
