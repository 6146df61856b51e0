"""What a call has finished before it is interrupted or fails is there for the next one."""

import pytest
import torch
from influence_models import fitted, names, queries

from lightning_influence.curvature import factor_passes
from lightning_influence.curvature.factors import Factors
from lightning_influence.methods.scoring_passes import ScorePass

OPTIONS = {"damping": 0.1, "log": False}


def interrupt(monkeypatch, owner, error):
    def stop(self, *arguments):
        raise error

    monkeypatch.setattr(owner, "step", stop)


@pytest.mark.grid
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
@pytest.mark.parametrize("method", ["ekfac", "auto"])
def test_refitted_factors_and_the_coarse_space_stay(monkeypatch, method, error):
    host, module = fitted()
    before = host.callbacks[0].influence_state
    with monkeypatch.context() as patch:
        interrupt(patch, ScorePass, error)
        with pytest.raises((error, SystemExit)):
            host.influence(module, query_dataloaders=queries(), method=method, factors="refit", **OPTIONS)
    state = host.callbacks[0].influence_state
    assert isinstance(state.factors, Factors)
    assert state.factors is not before.factors
    assert (state.coarse is not None) == (method == "auto")
    again = host.influence(module, query_dataloaders=queries(), method=method, **OPTIONS)
    assert not {"covariances", "eigenvalues"} & {*names(again)}
    assert again.diagnostics.extra["factors"].startswith("from the pass")
    new = host.influence(module, query_dataloaders=queries(), method=method, factors="refit", **OPTIONS)
    torch.testing.assert_close(again.scores, new.scores)


def test_unfinished_factors_leave_those_there_were(monkeypatch):
    host, module = fitted()
    before = host.callbacks[0].influence_state
    factors = before.factors
    found = vars(factor_passes).values()
    kinds = [kind for kind in found if isinstance(kind, type) and hasattr(kind, "step")]
    assert kinds
    with monkeypatch.context() as patch:
        for kind in kinds:
            interrupt(patch, kind, KeyboardInterrupt)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            host.influence(module, query_dataloaders=queries(), method="ekfac", factors="refit", **OPTIONS)
    assert host.callbacks[0].influence_state is before
    assert before.factors is factors
