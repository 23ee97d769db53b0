"""Configs: loading, overriding, checking, saving."""

import glob
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3ae_jax import config as config_lib
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
    names = ("small", "base", "large", "huge", "giant", "mae_base")
    golden("configs.json", {n: config_lib.resolve(config_lib.load(f"configs/{n}.py")).to_dict() for n in names})


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("--config.model.text_mask_ratio=0.9", "model.text_mask_ratio", 0.9),
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
            "--config.model.text_mask_ration=0.9",
            ["model.text_mask_ration", "did you mean --config.model.text_mask_ratio"],
        ),
        ("--config.text_mask_ratio=0.9", ["did you mean --config.model.text_mask_ratio"]),
        ("--config.model=0.9", ["group", "model.width"]),
        ("--config.batch_size=many", ["batch_size", "'many'", "an integer", "4096"]),
        ("--config.batch_size=1.5", ["batch_size", "an integer"]),
        ("--config.data.flip=maybe", ["true or false"]),
        ("--config.data.crop_scale=small", ["tuple", "(0.2, 1.0)"]),
        ("--config.model.text_mask_ratio=half", ["a number"]),
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
        ("model.text_mask_ratio=1.0", ["model.text_mask_ratio=1.0", "0.0 and 0.95"]),
        ("model.image_mask_ratio=-0.1", ["between"]),
        ("model.text_mask_ratio=nan", ["between"]),
        ("duration=10 weeks", ["duration", "steps", "epochs"]),
        ("duration=soon", ["N steps"]),
        ("duration=0 steps", ["more than 0"]),
        ("data.patch_size=7", ["data.image_size=256", "data.patch_size=7"]),
        ("data.modalities=audio", ["data.modalities", "'image' and 'text'"]),
        ("data.modalities=()", ["data.modalities"]),
        ("data.crop_scale=(0.9, 0.1)", ["data.crop_scale"]),
        ("data.image_std=(0.0, 1.0, 1.0)", ["data.image_std"]),
        ("model.heads=5", ["model.width=768", "model.heads=5"]),
        ("model.compute_dtype=float16", ["bfloat16"]),
        ("loss.text_average=batch", ["example, token"]),
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
    config = config_lib.resolve(config_lib.load("configs/mae_large.py"))
    assert config.data.modalities == ("image",)
    assert not config.model.use_type_embedding


def test_a_config_file_with_a_mistake_is_told_in_one_line(tmp_path):
    file = tmp_path / "mine.py"
    for line, match in (
        (
            "c.model.text_mask_ration = 0.9",
            r"model\.text_mask_ration is unknown here; did you mean model\.text_mask_ratio",
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
