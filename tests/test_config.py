"""Configs: loading, overriding, checking, saving."""

import glob
import json
import logging
import sys
import types
import typing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import m3ae_jax.config as config_lib
from m3ae_jax.config import schema
from m3ae_jax.config.__main__ import markdown, meanings
from m3ae_jax.config.fields import FieldGroup, declared, setting
from m3ae_jax.config.schema import identifies
from m3ae_jax.errors import UserError

ALL = sorted(glob.glob("configs/*.py"))


def apply(*overrides: str):
    config = config_lib.default()
    pairs, rest = config_lib.split_overrides(list(overrides))
    assert rest == []
    config_lib.apply_overrides(config, pairs)
    return config


@pytest.mark.parametrize("path", ALL)
def test_every_config_loads_resolves_and_survives_json(path):
    config = config_lib.load(path)
    resolved = config_lib.resolve(config)
    again = config_lib.from_json(config_lib.to_json(resolved))
    assert config_lib.difference(again, resolved) == []
    assert config_lib.resolve(again).to_dict() == resolved.to_dict()


@pytest.mark.parametrize("path", ALL)
def test_every_config_names_its_command_and_its_result(path):
    docstring = Path(path).read_text(encoding="utf-8").split('"""')[1]
    assert f"--config={path}" in docstring
    assert "Result:" in docstring


def test_the_papers_recipe(golden):
    names = ("small", "base", "large", "huge", "mae")
    configs = {name: config_lib.load(f"configs/{name}.py") for name in names}
    configs["giant"] = config_lib.load("configs/base.py")
    configs["giant"].model.size = "giant"
    golden("configs.json", {name: config_lib.resolve(config).to_dict() for name, config in configs.items()})


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("--config.m3ae.text_mask_ratio=0.9", "m3ae.text_mask_ratio", 0.9),
        ("--config.batch_size=64", "batch_size", 64),
        ("--config.data.flip=false", "data.flip", False),
        ("--config.data.modalities=image", "data.modalities", ("image",)),
        ("--config.data.modalities=('image','text')", "data.modalities", ("image", "text")),
        ("--config.data.crop_scale=(0.5, 1)", "data.crop_scale", (0.5, 1.0)),
        ("--config.data.crop_scale=0.5,1.0", "data.crop_scale", (0.5, 1.0)),
        ("--config.evals=grounding", "evals", ("grounding",)),
        ("--config.evals=()", "evals", ()),
        ("--config.data.train.path=/a=b/{0..3}.tar", "data.train.path", "/a=b/{0..3}.tar"),
        ("--config.duration=3 epochs", "duration", "3 epochs"),
        ("--config.model.size=", "model.size", ""),
    ],
)
def test_override(override, path, value):
    config = apply(override)
    for part in path.split("."):
        config = config[part]
    assert config == value
    assert type(config) is type(value)


def test_override_with_its_value_apart():
    pairs, rest = config_lib.split_overrides(["prog", "--config.seed", "7", "--mode=train", "--config=x.py"])
    assert pairs == [("seed", "7")]
    assert rest == ["prog", "--mode=train", "--config=x.py"]


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        (
            "--config.m3ae.text_mask_ration=0.9",
            ["m3ae.text_mask_ration", "did you mean --config.m3ae.text_mask_ratio"],
        ),
        ("--config.text_mask_ratio=0.9", ["did you mean --config.m3ae.text_mask_ratio"]),
        ("--config.model=0.9", ["group", "model.width"]),
        ("--config.batch_size=many", ["batch_size", "'many'", "an integer", "4096"]),
        ("--config.batch_size=1.5", ["batch_size", "an integer"]),
        ("--config.data.flip=maybe", ["true or false"]),
        ("--config.data.crop_scale=small", ["tuple", "(0.2, 1.0)"]),
        ("--config.m3ae.text_mask_ratio=half", ["a number"]),
        ("--config.seed", ["needs a value"]),
    ],
)
def test_wrong_override_is_one_line_with_a_hint(override, parts):
    with pytest.raises(UserError) as error:
        apply(override)
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("model.size=bse", ["model.size='bse'", "base, enormous, giant, huge, large, small", "did you mean 'base'"]),
        ("m3ae.text_mask_ratio=1.0", ["m3ae.text_mask_ratio=1.0", "0.0 and 0.95"]),
        ("m3ae.image_mask_ratio=-0.1", ["between"]),
        ("m3ae.text_mask_ratio=nan", ["between"]),
        ("duration=10 weeks", ["duration", "steps", "epochs"]),
        ("duration=soon", ["N steps"]),
        ("duration=0 steps", ["more than 0"]),
        ("data.patch_size=7", ["data.image_size=256", "data.patch_size=7"]),
        ("data.modalities=audio", ["data.modalities", "'image' and 'text'"]),
        ("data.modalities=()", ["data.modalities"]),
        ("data.crop_scale=(0.9, 0.1)", ["data.crop_scale"]),
        ("data.image_std=(0.0, 1.0, 1.0)", ["data.image_std"]),
        ("model.heads=5", ["model.width=768", "model.heads=5"]),
        ("compute.dtype=float16", ["bfloat16"]),
        ("m3ae.text_average=batch", ["example, token"]),
        ("batch_size=0", ["batch_size=0"]),
    ],
)
def test_wrong_value_is_one_line(override, parts):
    config = apply(f"--config.{override}")
    with pytest.raises(UserError) as error:
        config_lib.resolve(config)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


def test_load_errors(tmp_path):
    with pytest.raises(UserError, match=r"no such file.*did you mean configs/tiny.py"):
        config_lib.load("configs/tinny.py")
    empty = tmp_path / "empty.py"
    empty.write_text("")
    with pytest.raises(UserError, match="get_config"):
        config_lib.load(str(empty))
    broken = tmp_path / "config.json"
    for text, match in (("{", "not JSON"), ("[]", "object"), ('{"modle": {}}', "unknown"), ('{"model": 3}', "group")):
        broken.write_text(text)
        with pytest.raises(UserError, match=match):
            config_lib.load(str(broken))


@given(st.integers(1, 10**6), st.integers(1, 5000), st.integers(1, 10**7))
def test_durations_agree(amount, batch, examples):
    assert config_lib.steps("duration", f"{amount} steps", batch, examples) == amount
    assert config_lib.steps("duration", f"{amount * batch} examples", batch, examples) == amount
    epochs = config_lib.steps("duration", f"{amount} epochs", batch, examples)
    assert abs(epochs * batch - amount * examples) <= batch * (1 + 1e-9)


def test_image_only_is_mae():
    config = config_lib.resolve(config_lib.load("configs/mae.py"))
    assert config.data.modalities == ("image",)
    assert not config.m3ae.use_type_embedding


def test_a_config_file_with_a_mistake_is_told_in_one_line(tmp_path):
    file = tmp_path / "mine.py"
    for line, match in (
        (
            "c.m3ae.text_mask_ration = 0.9",
            r"m3ae\.text_mask_ration is unknown here; did you mean m3ae\.text_mask_ratio",
        ),
        ("c.batch = 3", "batch is unknown here; did you mean batch_size"),
    ):
        file.write_text(
            f"from m3ae_jax.config import default\ndef get_config():\n    c = default()\n    {line}\n    return c\n"
        )
        with pytest.raises(UserError, match=match):
            config_lib.load(str(file))
    saved = tmp_path / "config.json"
    saved.write_text('{"batch_size": "many"}')
    with pytest.raises(UserError, match=r"batch_size='many' is not of type int"):
        config_lib.load(str(saved))


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("lr", "optimizer.learning_rate"),
        ("optimizer.lr", "optimizer.learning_rate"),
        ("eval.finetune.lr", "eval.finetune.learning_rate"),
        ("wd", "optimizer.weight_decay"),
        ("weight_decay", "optimizer.weight_decay"),
        ("epochs", "duration"),
        ("steps", "duration"),
        ("warmup", "optimizer.warmup"),
        ("batch", "batch_size"),
        ("bs", "batch_size"),
        ("mask_ratio", "m3ae.image_mask_ratio"),
        ("text_mask_ratio", "m3ae.text_mask_ratio"),
        ("remat", "compute.remat"),
        ("model.remat", "compute.remat"),
        ("model.compute_dtype", "compute.dtype"),
        ("loss.image_weight", "m3ae.image_weight"),
        ("layers", "model.depth"),
        ("dim", "model.width"),
    ],
)
def test_usual_names_lead_to_the_field(name, field):
    with pytest.raises(UserError, match=rf"^--config\.{name}: no such field; did you mean --config\.{field}\?"):
        apply(f"--config.{name}=1")


DURATIONS = [name for name, field in config_lib.fields(config_lib.default()).items() if field.duration]


@pytest.mark.parametrize("name", DURATIONS)
def test_a_bare_number_is_no_duration(name, tmp_path):
    assert len(DURATIONS) >= 9
    file = tmp_path / "mine.py"
    file.write_text(
        f"from m3ae_jax.config import default\ndef get_config():\n    c = default()\n    c.{name} = 10\n    return c\n"
    )
    config = config_lib.default()
    *parents, last = name.split(".")
    stored = config.to_dict()
    group = stored
    for parent in parents:
        group = group[parent]
    group[last] = 10
    for wrong in (
        apply(f"--config.{name}=10"),
        config_lib.load(str(file)),
        config_lib.from_json(json.dumps(stored)),
    ):
        with pytest.raises(UserError, match=rf'^{name}=\'10\': a duration is .*; did you mean "10 steps"\?$'):
            config_lib.resolve(wrong)


def groups():
    every = {path: schema.imported(where) for path, where in schema.GROUPS.items()}
    return every | schema.objective_fields("m3ae")


@pytest.mark.parametrize(("path", "group"), groups().items())
def test_every_declared_field_is_right_by_itself(path, group):
    texts, hints = meanings(group), typing.get_type_hints(group)
    for name, field in declared(group).items():
        assert texts[name].endswith("."), f"{path}.{name} has no meaning"
        kind, annotated = type(field.default), hints[name]
        assert kind is (typing.get_origin(annotated) or annotated), name
        if kind is tuple:
            assert set(typing.get_args(annotated)) <= {field.item, ...}, name
        assert not field.choices or kind is tuple or field.default in field.choices


@pytest.mark.parametrize(("name", "field"), config_lib.fields(config_lib.default()).items())
def test_every_field_survives_json_and_the_command_line(name, field):
    value = field.default
    config = apply(f"--config.{name}={','.join(map(str, value)) or '()' if isinstance(value, tuple) else value}")
    for again in (config, config_lib.from_json(config_lib.to_json(config)), config_lib.resolve(config)):
        leaf = schema.leaves(again)[name]
        assert type(leaf) is type(value)
        assert leaf == value or name in ("model.width", "model.depth", "model.heads")


def test_the_page_of_all_fields_is_up_to_date():
    assert Path("docs/config.md").read_text(encoding="utf-8") == markdown(), "run python -m m3ae_jax.config --output="


class Mine:
    """An objective of the user's, which is not in the package."""

    name = "own"

    class Fields(FieldGroup):
        """Its fields."""

        share: float = setting(0.5, low=0.0, high=1.0, aliases=("ratio",))
        """What is shared."""


def test_the_group_of_the_chosen_objective_alone_is_there(monkeypatch):
    module = types.ModuleType("somewhere_else")
    module.Mine = Mine
    monkeypatch.setitem(sys.modules, "somewhere_else", module)
    path = "somewhere_else:Mine"
    # In whatever order: the objective counts first.
    config = apply("--config.own.share=1", f"--config.objective={path}")
    assert "m3ae" not in config and config.own.share == 1.0 and identifies("own.share", path)
    assert config_lib.difference(config_lib.default(path), config) == [("own.share", 0.5, 1.0)]
    with pytest.raises(UserError, match=r"did you mean --config\.own\.share"):
        config_lib.apply_overrides(config, [("ratio", "1")])
    again = config_lib.from_json(config_lib.to_json(config))
    assert again.to_dict() == config.to_dict()
    again.own.share = 2
    with pytest.raises(UserError, match=r"own\.share=2\.0 is not between 0\.0 and 1\.0"):
        config_lib.resolve(again)
    config_lib.apply_overrides(config, [("objective", "m3ae")])
    assert "own" not in config and config.m3ae.text_mask_ratio == 0.75
    # As long as its module is not imported, what is stored is taken as it is.
    stored = config_lib.to_json(again)
    monkeypatch.delitem(sys.modules, "somewhere_else")
    assert config_lib.resolve(config_lib.from_json(stored)).own.share == 2


def test_a_run_of_the_former_layout_is_refused_with_its_commit():
    for stored in ({"loss": {"image_weight": 1.0}}, {"model": {"decoder_width": 512}}):
        with pytest.raises(UserError, match="377e22f") as error:
            config_lib.from_json(json.dumps(stored))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("    return 1 / 0", r"line 2: ZeroDivisionError"),
        ("    return {}", "returns a dict, not a ConfigDict"),
        (
            "    from m3ae_jax.config import default\n    c = default()\n"
            "    c.objective = 'tests.objectives.toy:Toy'\n    return c",
            r"has no group toy: start from default\('tests.objectives.toy:Toy'\)",
        ),
    ],
)
def test_a_config_file_that_fails_is_one_line(tmp_path, body, message):
    file = tmp_path / "mine.py"
    file.write_text(f"def get_config():\n{body}\n")
    with pytest.raises(UserError, match=message) as error:
        config_lib.load(str(file))
    assert "\n" not in str(error.value)


def test_a_mistake_in_a_config_file_is_told_with_its_line_by_any_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("def get_config():\n    return 1 / 0\n")
    with pytest.raises(UserError, match=r"^--config='mine', line 2: ZeroDivisionError"):
        config_lib.load("mine")


def test_item_8_a_config_is_found_by_name_in_any_folder(tmp_path, monkeypatch, caplog):
    tiny = config_lib.load("configs/tiny.py").to_dict()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger("m3ae_jax"), "propagate", True)
    caplog.set_level(logging.INFO, "m3ae_jax")
    assert config_lib.load("tiny").to_dict() == tiny
    assert caplog.messages == []
    for name in ("configs/tiny.py", "configs/tiny"):
        caplog.clear()
        assert config_lib.load(name).to_dict() == tiny
        assert caplog.messages == [f"--config={name} is not in this folder: taking the tiny of m3ae_jax.configs"]
    Path("tiny").mkdir()  # a folder is no config
    assert config_lib.load("tiny").to_dict() == tiny
    own = "from m3ae_jax.configs import tiny as t\ndef get_config():\n    c = t.get_config()\n"
    own += "    c.seed = %d\n    return c\n"
    caplog.clear()
    Path("tiny.py").write_text(own % 7)
    Path("tiny/mine.py").write_text(own % 8)
    assert config_lib.load("tiny").seed == 7
    assert "tiny.py, and not the config of that name in m3ae_jax.configs" in caplog.text
    assert config_lib.load("tiny/mine").seed == config_lib.load("tiny/mine.py").seed == 8


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "nosuch",
            r"there are base, binding, claims, .*, own_run\.py, scenes, simla, small, tiny, visual_tokenizer\)$",
        ),
        ("tinny", r"visual_tokenizer\); did you mean tiny\?$"),
        ("tiny.py", r"did you mean tiny\?$"),
        ("configs/tinny.py", r"did you mean tiny\?$"),
        ("elsewhere/tiny.py", r"did you mean tiny\?$"),
        ("own_runs.py", r"did you mean own_run\.py\?$"),
        ("run", r"'run' is a folder; did you mean run/config\.json\?$"),
        ("", r"no such file"),
        ("x" * 300, r"no such file"),
    ],
)
def test_item_8_an_unknown_config_lists_those_that_exist(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    Path("own_run.py").touch()
    Path("run").mkdir()
    Path("run/config.json").touch()
    with pytest.raises(UserError, match=message) as error:
        config_lib.load(name)
    assert "\n" not in str(error.value)


def test_item_8_a_config_imports_files_beside_it(tmp_path, monkeypatch):
    mine = "from mybase import base\ndef get_config():\n    import colorsys\n    from parts.sizes import WIDTH\n"
    mine += "    c = base()\n    c.model.width = WIDTH\n    return c\n"
    for folder, width in (("a", 32), ("b", 64)):
        (tmp_path / folder / "parts").mkdir(parents=True)
        (tmp_path / folder / "mine.py").write_text(mine)
        (tmp_path / folder / "mybase.py").write_text("from m3ae_jax.configs.tiny import get_config as base\n")
        (tmp_path / folder / "parts" / "sizes.py").write_text(f"WIDTH = {width}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    path = list(sys.path)
    assert [config_lib.load(f"{folder}/mine.py").model.width for folder in "aba"] == [32, 64, 32]
    assert sys.path == path and not {"mybase", "parts", "parts.sizes"} & set(sys.modules)
    assert "colorsys" in sys.modules, "what is not theirs stays"


def test_item_8_what_is_wrong_in_a_config_file_names_the_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from m3ae_jax.configs import tiny\ndef get_config():\n    c = tiny.get_config()\n"
        "    c.batch_size = '8'\n    return c\n"
    )
    with pytest.raises(UserError, match=r"--config='.*mine\.py': the config's field batch_size='8'"):
        config_lib.load(str(file))


def test_item_8_a_name_in_capitals_has_a_nearest_and_the_root_is_no_config():
    with pytest.raises(UserError, match="did you mean tiny"):
        config_lib.load("TINY")
    with pytest.raises(UserError, match="--config='/': no such file"):
        config_lib.load("/")
