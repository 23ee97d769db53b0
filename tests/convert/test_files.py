"""Files as people have them: fine-tuned, wrapped, without an ending. Needs no PyTorch."""

import json
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from m3ae_jax import inference
from m3ae_jax.checkpoint import origin
from m3ae_jax.convert import check, convert, safetensors, torch_file
from m3ae_jax.convert.formats import Foreign
from m3ae_jax.convert.keymap import Report
from m3ae_jax.convert.unpickle import Global, Made
from m3ae_jax.errors import UserError
from m3ae_jax.objectives.base import build
from tests.objectives import small
from tests.test_inference import make_run, pictures

HEADS = [("model.heads", "2"), ("m3ae.decoder_heads", "2")]
Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("files") / "run", modalities=("image",))


@pytest.fixture(scope="module")
def mae(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Arrays:
    """A MAE's parameters by its project's names."""
    file = tmp_path_factory.mktemp("mae") / "mae.safetensors"
    convert.export_weights(inference.read(str(run)), "mae", file)
    return safetensors.load(file)[0]


def fine_tuned(mae: Arrays) -> Arrays:
    """As facebookresearch/mae's main_finetune.py saves it: the mean of the patches, fc_norm, a linear layer."""
    encoder = {name: x for name, x in mae.items() if not name.startswith(("decoder", "mask_token", "norm."))}
    norm = {"fc_norm.weight": mae["norm.weight"] + 0.5, "fc_norm.bias": mae["norm.bias"] + 0.25}
    return {**encoder, **norm, "head.weight": np.ones((10, 16), np.float32), "head.bias": np.ones(10, np.float32)}


def linear_probe(mae: Arrays) -> Arrays:
    """As main_linprobe.py saves it: the CLS token's norm, a batch norm, a linear layer."""
    encoder = {name: x for name, x in mae.items() if not name.startswith(("decoder", "mask_token"))}
    head = {"head.0.running_mean": np.ones(16, np.float32), "head.1.weight": np.ones((10, 16), np.float32)}
    return {**encoder, **head}


def imported(path: Path, arrays: Arrays, format: str = "") -> convert.Converted:
    safetensors.save(path / "x.safetensors", arrays, {})
    return convert.import_weights(path / "x.safetensors", format, HEADS)


@pytest.mark.parametrize("format", ["", "mae", "timm"])
def test_item_12_a_fine_tuned_mae(mae: Arrays, tmp_path: Path, format: str) -> None:
    converted = imported(tmp_path, fine_tuned(mae), format)
    assert converted.report.unused == ["head.bias (of its classifier)", "head.weight (of its classifier)"]
    norm = converted.params["encoder"]["transformer"]["norm"]
    assert np.array_equal(norm["scale"], mae["norm.weight"] + 0.5)
    assert np.array_equal(norm["bias"], mae["norm.bias"] + 0.25)
    (note,) = [note for note in converted.report.notes if "fc_norm" in note]
    assert note.startswith("DIFFERS: ") and "global_pool" in note
    assert any("no decoder" in note for note in converted.report.notes)
    assert check.compare(converted).close


def test_item_12_a_linear_probe_of_mae(run: Path, mae: Arrays, tmp_path: Path) -> None:
    converted = imported(tmp_path, linear_probe(mae))
    assert [name.partition(" ")[0] for name in converted.report.unused] == ["head.0.running_mean", "head.1.weight"]
    convert.write_run(converted, tmp_path / "run")
    got = inference.load(str(tmp_path / "run"))
    want = inference.load(str(run))
    got.config.data.update(image_mean=want.config.data.image_mean, image_std=want.config.data.image_std)
    encoder = flatten_dict(converted.params["encoder"], sep="/")
    stored = flatten_dict(inference.read(str(run)).params["encoder"], sep="/")
    for name in ("cls_token", "transformer/norm/scale", "image/embedding/kernel"):
        assert np.array_equal(encoder[name], stored[name]), name
    assert got.encode(pictures(1)).cls.shape == (1, 16)


@pytest.mark.parametrize("prefix", ["module.", "module._orig_mod.", "model.", "backbone.", "module.encoder_q."])
def test_item_12_a_wrappers_prefix_is_taken_off_and_told(mae: Arrays, tmp_path: Path, prefix: str) -> None:
    plain = imported(tmp_path, mae)
    converted = imported(tmp_path, {prefix + name: x for name, x in mae.items()})
    assert converted.format == "mae" and not converted.report.missing and not converted.report.unused
    assert any(f"the prefix {prefix!r} of all names" in note for note in converted.report.notes)
    left, right = (flatten_dict(c.params, sep="/") for c in (plain, converted))
    assert left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


def test_timms_folder_says_its_pixels(mae: Arrays, tmp_path: Path) -> None:
    encoder = {name: x for name, x in mae.items() if not name.startswith(("decoder", "mask_token"))}
    safetensors.save(tmp_path / "model.safetensors", encoder, {})
    content = {"architecture": "vit_tiny", "pretrained_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.5, 0.6, 0.7]}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    for path in (tmp_path, tmp_path / "model.safetensors"):
        converted = convert.import_weights(path, "", HEADS)
        assert converted.format == "timm"
        assert converted.config.data.image_mean == (0.5, 0.4, 0.3)
        assert converted.config.data.image_std == (0.5, 0.6, 0.7)
        assert any("by the config.json beside it" in note for note in converted.report.notes)


def test_item_12_an_output_without_an_ending_gets_the_formats(run: Path, tmp_path: Path) -> None:
    stored = inference.read(str(run))
    for format, made in (("timm", "weights.safetensors"), ("m3ae", "weights.pkl"), ("safetensors", "own.safetensors")):
        convert.export_weights(stored, format, tmp_path / format / made.partition(".")[0], encoder_only=True)
        assert [file.name for file in (tmp_path / format).iterdir()] == [made]
    assert convert.output_of("mae", tmp_path / "weights") == tmp_path / "weights.pth"
    assert convert.import_weights(tmp_path / "timm" / "weights.safetensors", "", HEADS).format == "timm"
    (tmp_path / "file").touch()
    wrong: list[tuple[str, Any, str]] = [
        ("timm", "weights.pth", r"--to=timm writes \.safetensors"),
        ("mae", "timm", r"is a folder: name a file, as .*timm/model\.pth"),
        ("vitmae", "file", "is a file: --to=vitmae writes a folder"),
        ("safetensors", "file/x", "cannot be written: "),
        ("vitmea", "x", "did you mean 'vitmae'"),
    ]
    for format, name, said in wrong:
        with pytest.raises(UserError, match=said):
            convert.export_weights(stored, format, tmp_path / name)


def test_item_12_a_folder_is_called_a_folder(run: Path, tmp_path: Path) -> None:
    for path, format, said in (
        (tmp_path, "", "is a folder without config.json: transformers' ViTMAE, CLIP"),
        (tmp_path, "mae", "is a folder, and --format=mae takes a file"),
        (run, "", "is a run of this program: --to and --output"),
        (tmp_path / "none", "", "none does not exist"),
    ):
        with pytest.raises(UserError, match=said):
            convert.import_weights(path, format)


def test_item_10_a_converted_run_has_a_card_with_its_licence(mae: Arrays, tmp_path: Path) -> None:
    convert.write_run(imported(tmp_path, mae), tmp_path / "run", "mae.pth", "CC BY-NC 4.0")
    assert "`mae.pth`, of format mae, licence: CC BY-NC 4.0" in (tmp_path / "run" / "MODEL.md").read_text()
    assert origin.of_checkpoint(str(tmp_path / "run"))[-1] == {"run": str(tmp_path / "run"), "step": 0}


def test_item_12_a_state_dict_is_found_under_any_name() -> None:
    tensor = Made(Global("torch._utils._rebuild_tensor_v2"), ())
    file, state, other = Path("x.pth"), {"a": tensor}, {"b": tensor}
    for root in (
        state,
        {"model": state, "model_ema": other},
        {"teacher": state, "epoch": 3},
        {"model": 1, "net": state},
    ):
        assert torch_file._state_dict(file, root) == state
    with pytest.raises(UserError, match="several state dicts, student and teacher: save the one"):
        torch_file._state_dict(file, {"student": state, "teacher": other})
    with pytest.raises(UserError, match="no state dict, but epoch, model"):
        torch_file._state_dict(file, {"model": {}, "epoch": 3})


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_item_12_half_precision_has_fixed_positions_too(
    mae: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: Any
) -> None:
    half = {name: x.astype(dtype) for name, x in mae.items()}
    monkeypatch.setattr(safetensors, "load", lambda path: (half, {}))
    (tmp_path / "x.safetensors").touch()
    converted = convert.import_weights(tmp_path / "x.safetensors", "mae", HEADS)
    assert converted.config.m3ae.image_positions == "sincos"
    assert any("in half precision there" in note for note in converted.report.notes)
    assert check.compare(converted).close


@pytest.mark.parametrize("objective", ["visual_tokenizer", "mamo"])
def test_our_own_file_holds_what_belongs_to_the_model_beside_its_parameters(objective: str, tmp_path: Path) -> None:
    """A codebook; a teacher begins anew, as in a run that begins from other parameters."""
    config = small.config_of(objective, **({"visual_tokenizer.quantizer": "vq"} if objective != "mamo" else {}))
    model, words = build(config, 53), 53 if objective == "mamo" else 0
    key = jax.random.key(0)
    boxed = jax.jit(model.init)(key)
    params, extra = nn.unbox(boxed), nn.unbox(jax.jit(model.init_extra)(boxed, key))
    made = convert.Converted("safetensors", config, params, Report(), Foreign({}), words, jax.device_get(extra))
    convert.write_run(made, tmp_path / "run")
    convert.export_weights(inference.read(str(tmp_path / "run")), "safetensors", tmp_path / "own.safetensors")
    changes = [("data.tokenizer", "scenes")] if words else []
    again = convert.import_weights(tmp_path / "own.safetensors", overrides=changes)
    assert not again.report.missing and not again.report.unused
    for was, now in ((params, again.params), (extra, again.extra)):
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(was), now)
