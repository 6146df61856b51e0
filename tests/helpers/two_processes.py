"""Runs a script that starts a Trainer on two processes, and reports what it printed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# A process group left open is torn down by the interpreter's exit, whose threads may then abort the process.
FAREWELL = """
print(f"rank {trainer.global_rank} is fine", flush=True)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def check_script(script: str, folder: Path) -> None:
    """Run a script that names its ``trainer``; it gets the folder as argument and asserts on each rank."""
    path = folder / "script.py"
    path.write_text(script + FAREWELL)
    helpers = Path(__file__).parent
    paths = os.pathsep.join([str(helpers), str(helpers.parents[1])])
    result = subprocess.run(
        [sys.executable, str(path), str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    told = f"{result.stdout[-1000:]}\n{result.stderr[-3000:]}"
    assert result.returncode == 0, told
    assert all(f"rank {rank} is fine" in result.stdout for rank in (0, 1)), told
