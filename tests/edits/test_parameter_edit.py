"""Applying, reverting and storing edits, to the bit."""

import json
import warnings

import lightning
import pytest
import torch
from edit_models import accuracy, asked, blobs, fitted, of_class, train
from influence_models import Net, trainer
from rich.console import Console

from lightning_influence import InfluenceCallback, InfluenceModule
from lightning_influence.edits.parameter_edit import Change, ParameterEdit, changes_between
from lightning_influence.results.rendering import render_plain
from lightning_influence.support.errors import (
    CorruptFileError,
    EditMismatchError,
    InfluenceWarning,
    NonFiniteError,
)
from lightning_influence.support.storage import load_tensors, save_tensors


@pytest.fixture(scope="module")
def source():
    return fitted()


@pytest.fixture
def module(source):
    copy = Net(16)
    copy.load_state_dict(source.state_dict())
    return copy


@pytest.fixture
def edit(module):
    return InfluenceModule(module).forget(of_class(0), train(), ratio=0.2)


def bits(module):
    return {name: value.clone().view(torch.int32) for name, value in module.state_dict().items()}


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def test_computing_an_edit_leaves_the_module_as_it_was(module):
    module.train()
    # A negative zero would not survive an addition of zero.
    with torch.no_grad():
        module.body[0].weight[0, 0] = -0.0
    before, state = bits(module), torch.get_rng_state()
    edit = InfluenceModule(module).forget(of_class(0), train(), ratio=0.2)
    assert same(before, bits(module))
    assert torch.equal(state, torch.get_rng_state())
    assert module.training
    assert all(p.grad is None and p.requires_grad for p in module.parameters())
    assert not any(m._forward_hooks for m in module.modules())
    assert not edit.applied


def test_apply_and_revert_are_exact(module, edit):
    before = bits(module)
    assert edit.apply() is edit
    assert edit.applied
    changed = {name: (before[name] != bits(module)[name]).reshape(-1).nonzero().flatten() for name in before}
    for name, where in changed.items():
        allowed = edit.changes[name].index if name in edit.changes else torch.tensor([])
        assert torch.isin(where, allowed).all()
    assert sum(map(len, changed.values())) > 0.9 * edit.report.touched
    edit.revert()
    assert same(before, bits(module))
    assert not edit.applied


def test_as_a_context(module, edit):
    before = bits(module)
    with edit as entered:
        assert entered is edit
        assert accuracy(module, 0) == 0.0
    assert same(before, bits(module))
    with pytest.raises(ZeroDivisionError), edit:
        raise ZeroDivisionError
    assert same(before, bits(module))
    with edit:
        edit.revert()
    assert same(before, bits(module))


def test_the_measured_losses_are_those_of_the_module(module, edit):
    def loss(which):
        x, y = blobs().tensors
        x, y = (part[(y == 0) == which] for part in (x, y))
        with torch.no_grad():
            return float(torch.nn.functional.cross_entropy(module.eval()(x), y))

    assert loss(True) == pytest.approx(edit.report.edited.before, rel=1e-4)
    assert loss(False) == pytest.approx(edit.report.kept.before, rel=1e-4)
    with edit:
        assert loss(True) == pytest.approx(edit.report.edited.after, rel=1e-4)
        assert loss(False) == pytest.approx(edit.report.kept.after, rel=1e-4)
    assert (edit.report.edited.examples, edit.report.kept.examples) == (20, 40)


def test_twice_and_out_of_turn(module, edit):
    with pytest.raises(EditMismatchError, match="cannot be reverted: it is not applied"):
        edit.revert()
    edit.apply()
    with pytest.raises(EditMismatchError, match="cannot be applied: it is applied already"):
        edit.apply()


def test_other_weights_are_refused(module, edit):
    name, change = next(iter(edit.changes.items()))
    with torch.no_grad():
        dict(module.named_parameters())[name].reshape(-1)[change.index[0]] += 1
    before = bits(module)
    with pytest.raises(EditMismatchError, match=r"cannot be applied: the module's weights differ"):
        edit.apply()
    assert same(before, bits(module))


def test_training_on_is_noticed(module, edit):
    edit.apply()
    trainer(max_epochs=1).fit(module, train())
    with pytest.raises(EditMismatchError, match=r"cannot be reverted: .*trained"):
        edit.revert()


def test_training_inside_the_context_is_noticed(module, edit):
    with pytest.raises(EditMismatchError, match=r"cannot be reverted: .*trained"), edit:
        trainer(max_epochs=1).fit(module, train())


def test_two_edits_can_be_reverted_in_turn(module):
    before = bits(module)
    first = InfluenceModule(module).forget(of_class(0), train(), ratio=0.2).apply()
    between = bits(module)
    second = InfluenceModule(module).forget(of_class(1), train(), ratio=0.2).apply()
    second.revert()
    assert same(between, bits(module))
    first.revert()
    assert same(before, bits(module))


def test_save_and_load(module, edit, tmp_path):
    path = edit.save(tmp_path / "edit.safetensors")
    loaded = ParameterEdit.load(path, module)
    assert not loaded.applied
    assert loaded.report == edit.report
    before = bits(module)
    loaded.apply()
    assert edit.applied  # the same values, to the bit
    edited = ParameterEdit.load(path, module)  # of a model that is edited already
    assert edited.applied
    edited.revert()
    assert same(before, bits(module))


def test_load_refuses_another_module_and_other_files(edit, tmp_path):
    path = edit.save(tmp_path / "edit.safetensors")
    with pytest.raises(EditMismatchError, match=r"shape \(16, 4\); the module has shape \(5, 4\)"):
        ParameterEdit.load(path, Net(5))
    with pytest.raises(EditMismatchError, match="no such parameter"):
        ParameterEdit.load(path, torch.nn.Linear(2, 2))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CorruptFileError):
        ParameterEdit.load(path, Net(16))
    with pytest.raises(FileNotFoundError):
        ParameterEdit.load(tmp_path / "nothing", Net(16))


def rewritten(edit, path, **tensors):
    """The file of an edit, sealed anew with other tensors of its first parameter."""
    edit.save(path)
    stored, metadata = load_tensors(path)
    name = next(iter(edit.changes))
    save_tensors(path, stored | {f"{name}/{key}": value for key, value in tensors.items()}, metadata)
    return name


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda c: {"after": c.after[:1]}, r"'after' of shape \(1,\) for \d+ positions"),
        (lambda c: {"after": c.after[0]}, r"'after' of shape \(\) for \d+ positions"),
        (lambda c: {"before": c.before[:1]}, r"'before' of shape \(1,\) for"),
        (lambda c: {"after": c.after.clone().fill_(float("nan"))}, "NaN or infinity in 'after'"),
        (lambda c: {"after": c.after / 0}, "NaN or infinity in 'after'"),
        (lambda c: {"before": c.before.clone().fill_(float("nan"))}, "NaN or infinity in 'before'"),
        (lambda c: {"after": c.after.double()}, "'after' of torch.float64"),
        (lambda c: {"index": c.index.float()}, "torch.float32, not int64"),
        (lambda c: {"index": c.index - c.index[0] - 1}, "not distinct and from 0 to 63"),
        (lambda c: {"index": c.index + 64}, "not distinct and from 0 to 63"),
        (lambda c: {"index": c.index * 0}, "not distinct"),
        (lambda c: {key: getattr(c, key)[:0] for key in ("index", "before", "after")}, r"of shape \(0,\)"),
    ],
)
def test_a_file_without_one_finite_value_a_position_is_refused(module, edit, tmp_path, spoil, says):
    before, path = bits(module), tmp_path / "spoilt.safetensors"
    name = rewritten(edit, path, **spoil(next(iter(edit.changes.values()))))
    with pytest.raises(CorruptFileError, match=rf"spoilt\.safetensors.*{name!r}.*{says}"):
        ParameterEdit.load(path, module)
    assert same(before, bits(module))


def test_a_file_that_lacks_a_part_is_refused(module, edit, tmp_path):
    path, name = edit.save(tmp_path / "less.safetensors"), next(iter(edit.changes))
    tensors, metadata = load_tensors(path)
    del tensors[f"{name}/after"]
    save_tensors(path, tensors, metadata)
    with pytest.raises(CorruptFileError, match=rf"less\.safetensors.*{name}/after"):
        ParameterEdit.load(path, module)
    save_tensors(path, tensors, {**metadata, "shapes": None})
    with pytest.raises(CorruptFileError, match=r"less\.safetensors"):
        ParameterEdit.load(path, module)


def test_changes_of_ones_own_are_checked_too():
    index = torch.tensor([0, 2])
    with pytest.raises(ValueError, match=r"'after' of shape \(1,\) for 2 positions"):
        Change(index, torch.zeros(2), torch.zeros(1), (3,))
    with pytest.raises(NonFiniteError, match=r"values of 'weight' NaN or infinite.*smaller step="):
        changes_between(
            {"weight": torch.zeros(2)}, {"weight": torch.tensor([0.0, torch.inf])}, {"weight": index < 3}
        )


def test_half_precision_is_edited_in_its_own_values(source):
    module = Net(16)
    module.load_state_dict(source.state_dict())
    module.to(torch.bfloat16)
    half = torch.utils.data.TensorDataset(blobs().tensors[0].bfloat16(), blobs().tensors[1])
    loader = torch.utils.data.DataLoader(half, 16)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    edit = InfluenceModule(module).forget(of_class(0), loader, ratio=0.2)
    with edit:
        assert all(p.dtype == torch.bfloat16 for p in module.parameters())
        assert accuracy(module, 0, half) == 0.0
    assert all(torch.equal(before[name], p) for name, p in module.named_parameters())


def test_an_edited_module_is_saved_by_a_trainer_as_any_other(tmp_path):
    host, module = trainer(InfluenceCallback(every_n_steps=1), max_epochs=30), Net(16)
    host.fit(module, train())
    edit = InfluenceModule(module).forget(of_class(0), train(), ratio=0.2).apply()
    path = tmp_path / "edited.ckpt"
    host.save_checkpoint(path)
    loaded = Net.load_from_checkpoint(path)
    assert same(bits(module), bits(loaded))
    assert accuracy(loaded, 0) == 0.0
    # The edit goes back on the loaded module too.
    again = ParameterEdit.load(edit.save(tmp_path / "edit"), loaded)
    again.revert()
    assert accuracy(loaded, 0) == 1.0
    # And both go on training.
    lightning.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False
    ).fit(loaded, train())


def test_from_a_checkpoint_alone_weight_decay_is_that_of_the_run(tmp_path):
    host, module = trainer(InfluenceCallback(every_n_steps=1), max_epochs=30), Net(16)
    host.fit(module, train())
    host.save_checkpoint(tmp_path / "a.ckpt")
    options = {"ratio": 0.2, "step": "theory", "damping": 0.01}
    wrapped = InfluenceModule.from_checkpoint(str(tmp_path / "a.ckpt"), Net(16))
    own = wrapped.generalized_influence(of_class(0), train(), **options)
    told = InfluenceModule(module).generalized_influence(of_class(0), train(), weight_decay=1e-3, **options)
    none = InfluenceModule(module).generalized_influence(of_class(0), train(), **options)
    for name in own:
        torch.testing.assert_close(own[name], told[name])
    assert any(not torch.allclose(own[name], none[name], rtol=1e-3, atol=0) for name in own)


def test_a_summary(edit):
    text = render_plain(edit, width=90)
    for part in ("Edit to forget 20 examples (not applied)", "gif, rule 'gain' at 20.0%", "body.0", "20.0%"):
        assert part in text
    for part in ("forgotten", "kept (training)", "predicted", "times the theoretical 0.5"):
        assert part in text
    assert f"{edit.report.touched} of" in text
    assert "ParameterEdit('forget'" in repr(edit)
    with edit:
        assert "(applied)" in render_plain(edit)
    Console(file=None, quiet=True).print(edit)
    json.dumps(edit.report.to_state())


def test_layers_that_are_not_named_stay(source):
    edit = asked(source).forget(of_class(0), train(), ratio=0.5, layers=["body.3"])
    assert set(edit.changes) <= {"body.3.weight", "body.3.bias"}


def test_an_error_inside_the_context_is_not_replaced(source):
    module = Net(16)
    module.load_state_dict(source.state_dict())
    edit = asked(module).forget(of_class(0), train(), ratio=0.2)

    def fail():
        with edit, torch.no_grad():
            module.body[0].weight.add_(1)
            raise KeyError("boom")

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with pytest.raises(KeyError) as caught:
            fail()
    assert [found.category for found in warned] == [InfluenceWarning]
    assert warned[0].filename == __file__
    assert any("cannot be reverted: the module's weights differ" in note for note in caught.value.__notes__)
    module.load_state_dict(source.state_dict())
    with pytest.raises(EditMismatchError), edit, torch.no_grad():
        module.body[0].weight.add_(1)
    module.load_state_dict(source.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(KeyError) as caught, edit:
            raise KeyError("boom")
    assert not hasattr(caught.value, "__notes__")


def test_printing_shows_the_tables(wrapped, capsys):
    edit = wrapped.forget(of_class(0), train(), ratio=0.2, kept_bound=1e9)
    print(edit)
    shown = capsys.readouterr().out
    for part in ("forget 20 examples (not applied)", "Parameters that change", "Mean loss", "predicted"):
        assert part in shown
    assert "\x1b" not in shown
    assert "\n" not in repr(edit)
