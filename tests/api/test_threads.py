"""Threads that ask at once get the answers that they would get one after the other."""

import threading
import time

import lightning
import pytest
import torch
from influence_models import queries, train, trainer
from torch import nn
from torch.nn import functional as F

from lightning_influence import InfluenceModule, influence
from lightning_influence.running.loop_runner import LoopRunner
from lightning_influence.support.turns import take_turns

pytestmark = pytest.mark.filterwarnings("ignore:.*logging interval", "ignore:.*limit")


class Slow(lightning.LightningModule):
    """Its loss tells by its size if another thread has brought back the training mode."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        self.modes = []

    def training_step(self, batch, batch_idx):
        self.modes.append(self.training)
        time.sleep(0.002)  # other threads run
        return F.cross_entropy(self.net(batch[0]) * (3.0 if self.training else 1.0), batch[1])


def ask_at_once(questions):
    """The answers of threads that start together, and what any of them raised."""
    answers, errors, ready = {}, [], threading.Barrier(len(questions))

    def ask(number, question):
        ready.wait()
        try:
            answers[number] = question()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=ask, args=pair) for pair in enumerate(questions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert not errors
    return [answers[number] for number in range(len(questions))]


@pytest.mark.parametrize("training", [True, False])
def test_one_module_asked_by_several_threads(training):
    module = Slow().train(training)
    module.net[2].eval()
    modes = [part.training for part in module.modules()]
    weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    shared = InfluenceModule(module)
    questions = [
        lambda: shared.scores(train(shuffle=False), queries(), method="ekfac", damping=0.1).scores,
        lambda: InfluenceModule(module).scores(train(), queries(), method="identity").scores,
        lambda: shared.self_influence(train(shuffle=False), method="ekfac", damping=0.1).scores,
        lambda: InfluenceModule(module).scores(train(shuffle=False), queries(), damping=0.1).scores,
    ]
    alone = [question() for question in questions]
    module.modes.clear()
    for _ in range(3):
        for found, expected in zip(ask_at_once(questions), alone, strict=True):
            torch.testing.assert_close(found, expected)
    assert not any(module.modes)
    assert [part.training for part in module.modules()] == modes
    assert all(torch.equal(tensor, weights[name]) for name, tensor in module.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in module.parameters())


def test_one_trainer_asked_by_several_threads_about_several_models():
    models, host = [Slow(), Slow()], trainer()
    with torch.no_grad():
        models[1].net[0].weight.mul_(2)
    questions = [
        lambda model=model: influence(host, model, train(), queries(), method="identity", log=False).scores
        for model in models
    ]
    alone = [question() for question in questions]
    assert not torch.allclose(*alone)
    for _ in range(3):
        for found, expected in zip(ask_at_once(questions * 2), alone * 2, strict=True):
            torch.testing.assert_close(found, expected)
    assert all(model.training for model in models)


def test_a_thread_that_fails_gives_the_turn_on():
    module = Slow()

    def fail():
        with pytest.raises(TypeError, match="one batch"):
            InfluenceModule(module).scores((torch.ones(2), torch.ones(2)), queries())

    ask_at_once([fail, lambda: InfluenceModule(module).scores(train(), queries(), method="identity")])
    assert module.training


def test_a_runner_within_a_runner_of_the_same_thread_has_the_turn():
    module = Slow()
    with LoopRunner(module), LoopRunner(module):
        assert not module.training
    assert module.training


def test_what_takes_turns_never_overlaps():
    inside, most = [], []

    @take_turns
    def work(number):
        """What it does."""
        inside.append(number)
        most.append(len(inside))
        time.sleep(0.001)
        inside.remove(number)
        return number

    assert ask_at_once([lambda n=n: work(n) for n in range(8)]) == list(range(8))
    assert set(most) == {1}
    assert work.__doc__ == "What it does."
