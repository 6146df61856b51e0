"""Warnings: those of other packages stop neither tests nor users, deprecations of ours stop the tests."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest

TESTS = Path(__file__).parent / "helpers"
# What others do while they are imported is theirs, and so is `fit`, where Lightning warns on newer torch.
STRICT = """
import warnings
import lightning, torchmetrics

warnings.simplefilter("error")
from influence_models import Net, dataset, queries, train, trainer
from lightning_influence import InfluenceCallback, InfluenceModule
from lightning_influence.evaluation import proximal_response

METHODS = "auto ekfac kfac diagonal identity block_ggn exact hessian cg minres astra lissa".split()

host, net = trainer(InfluenceCallback(every_n_steps=1), max_epochs=2), Net()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    host.fit(net, train())
for method in METHODS:
    host.influence(net, train(), queries(), method=method, damping=0.1)
    InfluenceModule(net).scores(train(), queries(), method=method, damping=0.1)
host.self_influence(net, train())
InfluenceModule(net).spectrum(train(), "hessian", probes=2, steps=2)
host.relabel([1, 2], 0, net, train())
host.forget([1, 2], net, train(), step="theory").apply()
(x, y), body = dataset().tensors, net.body.double()
proximal_response(body, (x.double(), y), (x[:3].double(), y[:3]), [0], damping=0.1)
print("answered", len(METHODS))
"""


@pytest.mark.slow
def test_no_pass_warns():
    """Where every warning is an exception there is an answer; torch gives some but once a process."""
    command = [sys.executable, "-c", STRICT]
    done = subprocess.run(command, capture_output=True, text=True, cwd=TESTS, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "answered 12" in done.stdout
    # torch 2.5 leaves a temporary directory of its own to the end of the process.
    told = [line for line in done.stderr.splitlines() if "ResourceWarning" not in line]
    assert "Warning" not in "\n".join(told)


@pytest.mark.parametrize("category", [FutureWarning, DeprecationWarning, PendingDeprecationWarning])
@pytest.mark.parametrize(
    "module", ["lightning_influence", "lightning_influence.linalg.lanczos", "oracle", __name__]
)
def test_deprecations_in_what_we_call_are_errors(category, module):
    with pytest.raises(category):
        warnings.warn_explicit("old", category, "file.py", 1, module)


@pytest.mark.parametrize(
    "module", ["torch.jit._script", "lightning.pytorch.loops", "typing_extensions", "modelscope"]
)
def test_deprecations_inside_other_packages_are_not(module):
    with warnings.catch_warnings(record=True) as caught:  # pytest.warns would set the filters aside
        warnings.warn_explicit("old", FutureWarning, "file.py", 1, module)
    assert len(caught) == 1
