import pytest
import torch
from benchmarks import load_benchmark
from torch import nn

from lightning_influence.evaluation.harness.run import derive_seed
from lightning_influence.evaluation.losses import binary_cross_entropy, cross_entropy, squared_error
from lightning_influence.support.errors import NonFiniteError, UnsupportedModelError

recipes, stacked_training = load_benchmark("recipes"), load_benchmark("stacked_training")
Recipe, draw_orders, make_optimizer = recipes.Recipe, recipes.draw_orders, recipes.make_optimizer
Member, build, train_members = stacked_training.Member, stacked_training.build, stacked_training.train_members

RECIPE = Recipe(0.1, epochs=5, batch_size=4, momentum=0.9, weight_decay=1e-2)


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3)).double()


def cnn():
    first = (nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    return nn.Sequential(*first, nn.Flatten(), nn.Linear(12, 3)).double()


def table(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(*shape, generator=generator, dtype=dtype)
    return inputs, torch.randint(3, shape[:1], generator=generator)


def members(count, *keep):
    """Subsets of different sizes, so that both batches and runs end at different steps."""
    kept = [torch.arange(count) % modulus != 0 for modulus in keep]
    return [Member(mask, seed) for seed, mask in enumerate(kept)]


def sequential(factory, recipe, data, member, loss=nn.functional.cross_entropy):
    """The same run as anyone would write it."""
    model = build(factory, member)
    common = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
    optimizer = {
        "sgd": lambda: torch.optim.SGD(model.parameters(), momentum=recipe.momentum, **common),
        "adam": lambda: torch.optim.Adam(model.parameters(), betas=recipe.betas, eps=recipe.eps, **common),
        "adamw": lambda: torch.optim.AdamW(model.parameters(), betas=recipe.betas, eps=recipe.eps, **common),
    }[recipe.optimizer]()
    total = recipe.steps(int(member.mask.sum()))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: recipe.rate(k, total) / recipe.learning_rate
    )
    for order in draw_orders(member.mask, recipe, member.seed):
        for batch in order.split(recipe.batch_size):
            optimizer.zero_grad()
            loss(model(data[0][batch]), data[1][batch]).backward()
            optimizer.step()
            schedule.step()
    return dict(model.named_parameters())


@pytest.mark.grid
@pytest.mark.parametrize(("factory", "shape"), [(mlp, (21, 6)), (cnn, (21, 1, 4, 4))])
@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_a_member_equals_a_plain_run_of_sgd(factory, shape, schedule):
    recipe = Recipe(0.1, 5, 4, momentum=0.9, weight_decay=1e-2, schedule=schedule)
    data, runs = table(*shape), members(21, 2, 3, 7)
    trained = train_members(factory, recipe, data, runs)
    for row, run in enumerate(runs):
        for name, value in sequential(factory, recipe, data, run).items():
            # About 25 steps in another order of summation: rounding only.
            torch.testing.assert_close(trained[name][row], value.detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
@pytest.mark.parametrize(("betas", "eps"), [((0.9, 0.999), 1e-8), ((0.5, 0.8), 1e-2)])
def test_a_member_equals_a_plain_run_of_adam(optimizer, betas, eps):
    recipe = Recipe(0.02, 5, 4, weight_decay=0.1, optimizer=optimizer, betas=betas, eps=eps)
    data, runs = table(21, 6), members(21, 2, 3, 7)
    trained = train_members(mlp, recipe, data, runs)
    for row, run in enumerate(runs):
        for name, value in sequential(mlp, recipe, data, run).items():
            # The root of a moment near 0 amplifies rounding more than SGD does.
            torch.testing.assert_close(trained[name][row], value.detach(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("example_loss", "batch_loss"),
    [
        (squared_error, nn.functional.mse_loss),
        (binary_cross_entropy, nn.functional.binary_cross_entropy_with_logits),
    ],
)
def test_a_member_equals_a_plain_run_of_other_losses(example_loss, batch_loss):
    inputs = table(21, 6)[0]
    targets = (inputs[:, :3] > 0).double()
    runs = members(21, 2, 3)
    trained = train_members(mlp, RECIPE, (inputs, targets), runs, example_loss)
    for row, run in enumerate(runs):
        for name, value in sequential(mlp, RECIPE, (inputs, targets), run, batch_loss).items():
            torch.testing.assert_close(trained[name][row], value.detach(), rtol=1e-10, atol=1e-12)


def test_the_example_losses_refuse_targets_of_another_shape():
    """(B,) against (B, 1) would broadcast to (B, B)."""
    for loss in (squared_error, binary_cross_entropy):
        with pytest.raises(ValueError, match=r"outputs \(4, 1\) and targets \(4,\)"):
            loss(torch.zeros(4, 1), torch.zeros(4))


@pytest.mark.parametrize(("optimizer", "kind"), [("adam", "Adam"), ("adamw", "AdamW"), ("sgd", "SGD")])
def test_the_recipe_gives_torchs_optimizer(optimizer, kind):
    recipe = Recipe(0.02, 5, 4, weight_decay=0.1, optimizer=optimizer, betas=(0.8, 0.9), eps=1e-3)
    built = make_optimizer(mlp().parameters(), recipe)
    assert type(built).__name__ == kind
    group = built.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (0.02, 0.1)
    assert group.get("betas", (0.8, 0.9)) == (0.8, 0.9)


def test_a_member_does_not_depend_on_its_neighbours():
    data, runs = table(21, 6), members(21, 2, 3, 7)
    together = train_members(mlp, RECIPE, data, runs)
    alone = train_members(mlp, RECIPE, data, runs[1:2])
    for name, value in alone.items():
        torch.testing.assert_close(together[name][1], value[0], rtol=1e-10, atol=1e-12)


def test_seeds_change_the_initial_values_and_the_run():
    mask = torch.ones(21, dtype=torch.bool)
    trained = train_members(mlp, RECIPE, table(21, 6), [Member(mask, 0), Member(mask, 1)])
    assert not torch.allclose(trained["0.weight"][0], trained["0.weight"][1], atol=1e-2)


def test_initial_values_depend_on_the_seed_and_not_on_the_subset():
    kept = [torch.arange(21) % modulus != 0 for modulus in (2, 3)]
    values = [build(mlp, Member(mask, seed))[0].weight for mask in kept for seed in (0, 1)]
    assert torch.equal(values[0], values[2])
    assert torch.equal(values[1], values[3])
    assert not torch.equal(values[0], values[1])


def test_random_state_and_gradient_mode_are_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with torch.no_grad():
        trained = train_members(mlp, RECIPE, table(21, 6), members(21, 2))
    assert torch.equal(torch.rand(3), expected)
    assert not any(value.requires_grad for value in trained.values())


def test_frozen_parameters_and_buffers_are_each_members_own():
    def factory():
        model = mlp()
        model[0].weight.requires_grad_(False)
        model.register_buffer("offset", torch.rand(2, dtype=torch.float64))
        return model

    data, runs = table(21, 6), members(21, 2, 3)
    trained = train_members(factory, RECIPE, data, runs)
    for row, run in enumerate(runs):
        initial = build(factory, run)
        assert torch.equal(trained["0.weight"][row], initial[0].weight)
        assert torch.equal(trained["offset"][row], initial.offset)
        assert not torch.equal(trained["0.bias"][row], initial[0].bias)
    assert not torch.equal(trained["0.weight"][0], trained["0.weight"][1])


def test_dropout_is_on_while_training():
    def factory():
        return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3)).double()

    def without():
        return nn.Sequential(nn.Linear(6, 8), nn.Identity(), nn.Linear(8, 3)).double()

    data, runs = table(21, 6), members(21, 2, 3)
    noisy = train_members(factory, RECIPE, data, runs)
    assert torch.equal(noisy["0.weight"], train_members(factory, RECIPE, data, runs)["0.weight"])
    assert not torch.allclose(noisy["0.weight"], train_members(without, RECIPE, data, runs)["0.weight"])


def test_initialisation_is_the_factorys_own_under_the_members_seed():
    run = members(21, 2)[0]
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(run.seed, "init"))
        expected = mlp()
    assert torch.equal(build(mlp, run)[0].weight, expected[0].weight)


def test_a_diverged_run_is_named():
    recipe = Recipe(1e6, epochs=5, batch_size=4, momentum=0.9, weight_decay=1.0)
    with pytest.raises(NonFiniteError, match=r"seed 0 on 10 examples diverged.*Lower the recipe's learning"):
        train_members(lambda: mlp().float(), recipe, table(21, 6, dtype=torch.float32), members(21, 2))


def test_an_infinite_buffer_is_no_divergence():
    def factory():
        model = mlp()
        model.register_buffer("mask", torch.full((2, 2), float("-inf"), dtype=torch.float64).triu(1))
        return model

    data, runs = table(21, 6), members(21, 2)
    trained = train_members(factory, RECIPE, data, runs)
    assert torch.equal(trained["mask"][0], factory().mask)
    assert torch.equal(trained["0.weight"], train_members(mlp, RECIPE, data, runs)["0.weight"])


def test_running_statistics_are_refused_by_name():
    def factory():
        return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()

    with pytest.raises(UnsupportedModelError, match=r"Layer '1' \(BatchNorm1d\) updates running statistics"):
        train_members(factory, RECIPE, table(21, 6), members(21, 2))


def test_an_empty_subset_is_refused():
    with pytest.raises(ValueError, match="at least one kept example"):
        train_members(mlp, RECIPE, table(21, 6), [Member(torch.zeros(21, dtype=torch.bool), 0)])


def net():
    return nn.Linear(3, 2)


def test_the_key_of_plain_functions_is_what_it_always_was():
    """Ground truth of hours stands under such keys."""
    recipe = Recipe(0.1, epochs=2, batch_size=4)
    key = stacked_training.fingerprint(net, recipe, [torch.arange(3)], [cross_entropy])
    assert key == "ddd159e776d1c65c1ab2"
