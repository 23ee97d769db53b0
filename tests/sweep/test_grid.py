"""Axes of a grid, its runs, and what they may cost."""

import pytest

from m3ae_jax import config as config_lib
from m3ae_jax.data.text import load_tokenizer
from m3ae_jax.errors import UserError
from m3ae_jax.sweep.budget import Budgets
from m3ae_jax.sweep.grid import make_runs, parse_grid, split_overrides
from m3ae_jax.train.flops import flops_per_example


@pytest.fixture(scope="module")
def config():
    config = config_lib.load("configs/claims.py")
    config_lib.apply_overrides(config, [("duration", "100 steps"), ("model.depth", "1")])
    return config


def test_an_axis_has_fields_and_values(config):
    (axis,) = parse_grid(["config.m3ae.text_mask_ratio=0.15, 0.5"], config)
    assert axis.fields == ("m3ae.text_mask_ratio",) and axis.values == (("0.15",), ("0.5",))
    assert axis.name == "text_mask_ratio"


def test_axes_are_several_and_fields_change_together(config):
    axes = parse_grid(["model.width:model.heads=64:2,96:3; data.modalities=image,(image,text)"], config)
    assert axes[0].values == (("64", "2"), ("96", "3"))
    assert axes[1].values == (("image",), ("(image,text)",))
    runs = make_runs(axes, config, seeds=2)
    assert len(runs) == 2 * 2 * 2 and len({run.name for run in runs}) == 8
    assert [run.seed for run in runs] == [config.seed] * 4 + [config.seed + 1] * 4
    assert runs[-1].values == {"width:heads": "96:3", "modalities": "image,text"}
    assert dict(runs[-1].overrides) == {
        "seed": str(config.seed + 1),
        "model.width": "96",
        "model.heads": "3",
        "data.modalities": "(image,text)",
    }
    applied = config.copy_and_resolve_references()
    config_lib.apply_overrides(applied, list(runs[-1].overrides))
    assert applied.data.modalities == ("image", "text")


def test_no_grid_is_one_point(config):
    assert len(make_runs((), config, seeds=3)) == 3


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ("m3ae.text_mask_ratio", "FIELD=VALUE"),
        ("m3ae.text_mask_ratio=", "FIELD=VALUE"),
        ("model.text_mask_ration=0.5", "did you mean --config.m3ae.text_mask_ratio"),
        ("m3ae.text_mask_ratio=0.5,half", "'half' is not a number"),
        ("m3ae.text_mask_ratio=0.5,0.5", "twice"),
        ("model.width=64;model.width=96", "names model.width twice"),
        ("seed=1,2", "--seeds"),
        ("model.width:model.heads=64:2,96", "needs 2 values"),
        ("eval.train.path=a;eval.test.path=b", "could not be told apart"),
    ],
)
def test_a_wrong_grid_is_refused_in_a_line(config, grid, message):
    with pytest.raises(UserError, match=message) as error:
        parse_grid([grid], config)
    assert "\n" not in str(error.value)


def test_equal_flops_are_equal_to_a_step(config):
    axes = parse_grid(["model.width:model.heads=32:2,64:2", "data.modalities=image,(image,text)"], config)
    budgets = Budgets(config, axes, ["modalities"])
    for run in make_runs(axes, config, 1):
        of, first = (
            budgets.of(run),
            budgets.of(make_runs(axes, config, 1)[0 if run.values["width:heads"] == "32:2" else 2]),
        )
        own = config.copy_and_resolve_references()
        config_lib.apply_overrides(own, budgets.overrides(run))
        resolved = config_lib.resolve(own)
        a_step = resolved.batch_size * flops_per_example(resolved, load_tokenizer("scenes").vocab_size)
        assert resolved.duration == f"{of.steps} steps" and of.examples == of.steps * resolved.batch_size
        assert of.flops == pytest.approx(a_step * of.steps)
        assert abs(of.flops - first.flops) <= a_step / 2
        assert (of.steps < 100) == (run.values["modalities"] == "image,text")


def test_without_equal_flops_durations_stay(config):
    axes = parse_grid(["duration=10 steps,6400 examples"], config)
    budgets = Budgets(config, axes, [])
    runs = make_runs(axes, config, 1)
    assert [budgets.of(run).steps for run in runs] == [10, 100]
    assert budgets.overrides(runs[1])[-1] == ("duration", "6400 examples")


def test_fields_of_one_objective_count_for_its_runs_alone(config):
    overrides = [("simla.id_weight", "0"), ("m3ae.text_mask_ratio", "0.5"), ("batch_size", "8"), ("mamo.queue", "8")]
    grid = ["objective=m3ae,simla,contrastive"]
    common, conditional = split_overrides(overrides, grid, config)
    # MAMO is not in the grid: what reads the common ones refuses its field.
    assert common == [overrides[1], overrides[2], overrides[3]] and conditional == [overrides[0]]
    with pytest.raises(UserError, match="mamo"):
        config_lib.apply_overrides(config.copy_and_resolve_references(), common)
    overridden = config.copy_and_resolve_references()
    config_lib.apply_overrides(overridden, common[:2])
    axes = parse_grid(grid, overridden)
    budgets = Budgets(overridden, axes, ["objective"], conditional)
    runs = {run.values["objective"]: run for run in make_runs(axes, overridden, 1)}
    for name, run in runs.items():
        assert (("simla.id_weight", "0") in budgets.overrides(run)) == (name == "simla")
        own = overridden.copy_and_resolve_references()
        config_lib.apply_overrides(own, budgets.overrides(run))
        a_step = 8 * flops_per_example(config_lib.resolve(own), load_tokenizer("scenes").vocab_size)
        assert abs(budgets.of(run).flops - budgets.of(runs["m3ae"]).flops) <= a_step / 2
    # Of a config of one objective, or where an override names it, its fields are everybody's.
    assert split_overrides([("objective", "simla"), overrides[0]], [], config)[1] == []


@pytest.mark.parametrize(
    ("equal", "message"), [("modality", "--equal_flops='modality' is not one of"), ("duration", "cannot")]
)
def test_wrong_axes_of_equal_flops_are_refused(config, equal, message):
    axes = parse_grid(["data.modalities=image,(image,text);duration=5 steps,6 steps"], config)
    with pytest.raises(UserError, match=message):
        Budgets(config, axes, [equal])
