"""Runs scripts that ask on two processes, and reports what they printed.

A process that has imported the packages once stands by for the scripts of a test run. It makes two copies of
itself for each, and says of both which they are, as a cluster would; so Lightning starts none. Scripts that
are run as users run theirs, once, so that Lightning starts them again, are in ``tests/faults``.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

# A process group left open is torn down by the interpreter's exit, whose threads may then abort the process.
FAREWELL = """
print(f"rank {trainer.global_rank} is fine", flush=True)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""
#: How scripts begin that ask one Trainer of two processes about thirteen examples, in double precision.
BEGIN = """
import sys, warnings
import torch
from torch.utils.data import DataLoader, TensorDataset
from influence_models import Net, trainer as make
from lightning_influence import InfluenceModule

torch.set_num_threads(1)
warnings.simplefilter("ignore")
torch.manual_seed(0)
x, y = torch.randn(13, 4, dtype=torch.float64), torch.arange(13) % 3
module = Net().double()
trainer = make(devices=2, strategy="ddp", default_root_dir=sys.argv[1])
data = TensorDataset(x, y)
"""
_SECONDS = 300
_standing_by: list[subprocess.Popen[str]] = []


def check_script(script: str, folder: Path) -> None:
    """Run a script that names its ``trainer``; it gets the folder as argument and asserts on each rank."""
    path = folder / "script.py"
    path.write_text(script + FAREWELL)
    code, out, err = _ask(path, folder)
    told = f"{out[-1000:]}\n{err[-3000:]}"
    assert code == 0, told
    assert all(f"rank {rank} is fine" in out for rank in (0, 1)), told


def _environment() -> dict[str, str]:
    helpers = Path(__file__).parent
    paths = os.pathsep.join([str(helpers), str(helpers.parents[1])])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


def _ask(path: Path, folder: Path) -> tuple[int, str, str]:
    """Have the process that stands by run a script."""
    if not _standing_by or _standing_by[0].poll() is not None:
        _standing_by[:] = [
            subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=_environment(),
            )
        ]
        atexit.register(_standing_by[0].communicate)  # the end of its input is its end
    server = _standing_by[0]
    assert server.stdin is not None
    assert server.stdout is not None
    print(json.dumps([str(path), str(folder)]), file=server.stdin, flush=True)
    codes = json.loads(server.stdout.readline())
    texts = ["".join((folder / f"{kind}{rank}").read_text() for rank in (0, 1)) for kind in ("out", "err")]
    return max(map(abs, codes)), texts[0], texts[1]


def _stand_by() -> None:
    """Run the scripts that are asked for, one after the other, until nobody asks any more."""
    _import_packages()
    for line in sys.stdin:
        path, folder = json.loads(line)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        children = [_copy(rank, port, path, Path(folder)) for rank in (0, 1)]
        print(json.dumps(_wait(children)), flush=True)


def _import_packages() -> None:
    import torch.distributed.fsdp  # noqa: F401

    import lightning_influence  # noqa: F401


def _copy(rank: int, port: int, path: str, folder: Path) -> int:
    """Return the id of a copy of this process that runs a script as one of two."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / f"{name}{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        from lightning_utilities.core.rank_zero import rank_zero_only

        rank_zero_only.rank = rank  # as it is where the packages are imported by a process of this rank
        sys.argv = [path, str(folder)]
        sys.path.insert(0, str(Path(path).parent))
        runpy.run_path(path, run_name="__main__")
        code = 0
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _wait(children: list[int]) -> list[int]:
    """Return how processes ended; after one that failed, or too long, the others are ended."""
    codes: dict[int, int] = {}
    end = time.monotonic() + _SECONDS
    while len(codes) < len(children):
        for child in children:
            done, status = (0, 0) if child in codes else os.waitpid(child, os.WNOHANG)
            if done:
                codes[child] = os.waitstatus_to_exitcode(status)
                if codes[child]:  # what the other has to say of it comes soon
                    end = min(end, time.monotonic() + 20)
        if time.monotonic() > end:
            for child in children:
                if child not in codes:
                    os.kill(child, signal.SIGKILL)
            end = float("inf")
        time.sleep(0.05)
    return [codes[child] for child in children]


if __name__ == "__main__":
    _stand_by()
