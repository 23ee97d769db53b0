"""The M3AE reference's weights, converted: its own numbers, its checkpoint's form, and back again."""

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from m3ae_jax import config as config_lib
from m3ae_jax import inference
from m3ae_jax.checkpoint.init_from import load_into
from m3ae_jax.convert import check, convert
from m3ae_jax.data.text import load_tokenizer
from m3ae_jax.errors import UserError
from m3ae_jax.objectives.m3ae import M3AE

ROOT = Path(__file__).parents[2]
VARIANTS = ("m3ae", "m3ae_head", "m3ae_notype", "mae", "mae_notype")
SIZES = [
    ("model.heads", "4"),
    ("m3ae.decoder_heads", "4"),
    ("data.image_size", "32"),
    ("data.max_text_tokens", "16"),
]


@pytest.fixture
def parity(shared: Path) -> Path:
    return shared / "parity"


def batch_of(want: dict[str, np.ndarray], modalities: tuple[str, ...]) -> dict[str, Any]:
    """The reference's inputs under its own masks, as our batch."""
    groups = {}
    for m in modalities:
        value = want["in/image_patches" if m == "image" else "in/text"]
        real = np.ones(value.shape[:2], bool) if m == "image" else want["in/text_padding_mask"] == 0
        order, mask = np.argsort(want[f"mask/{m}_ids_restore"]), want[f"mask/{m}_mask"][0]
        sets = {"visible": order[: int((mask == 0).sum())], "target": np.flatnonzero(mask)}
        groups[m] = {
            kind: {
                "value": value[:, at],
                "position": np.broadcast_to(at.astype(np.int32), (len(value), len(at))),
                "valid": real[:, at],
            }
            for kind, at in sets.items()
        }
    return {"groups": groups}


@pytest.mark.parametrize("suffix", ["pkl", "npz"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_parity_weights_give_the_references_outputs(parity: Path, variant: str, suffix: str) -> None:
    converted = convert.import_weights(parity / f"{variant}_params.{suffix}", overrides=SIZES)
    report = converted.report
    assert not report.missing and not report.unused
    assert check.compare(converted).close
    want = dict(np.load(parity / f"{variant}.npz"))
    config = converted.config
    batch = batch_of(want, tuple(config.data.modalities))
    got = jax.jit(M3AE(config, converted.vocabulary).predict)(converted.params, batch)
    assert set(got) == set(config.data.modalities)
    for m, output in got.items():
        target = batch["groups"][m]["target"]
        expected = want[f"out/{m}_output"][:, target["position"][0]][target["valid"]]
        error = np.asarray(output)[target["valid"]] - expected
        assert len(expected) > 0
        assert np.linalg.norm(error) <= 1e-4 * np.linalg.norm(expected)


class M3AETrainState:
    """Stands in for the reference's class."""

    def __init__(self, params: Any) -> None:
        self.step, self.apply_fn, self.params, self.tx = np.int32(7), None, params, Stop()


class Stop:
    """Stands in for the optimizer's code: unpickled as usual it would end the test."""

    def __reduce__(self) -> Any:
        return sys.exit, ("the pickle was run",)


def test_a_full_checkpoint_with_code_in_it(parity: Path, tmp_path: Path) -> None:
    params = pickle.load((parity / "m3ae_params.pkl").open("rb"))
    flags = {
        "m3ae.model_type": None,
        "m3ae.num_heads": 4,
        "m3ae.dec_num_heads": 4,
        "m3ae.image_mask_ratio": 0.5,
        "data.image_size": 32,
        "data.tokenizer_max_length": 16,
        "data.image_normalization": "imagenet",
    }
    content = {"step": 7, "epoch": 1, "variant": flags, "state": M3AETrainState(params)}
    file = tmp_path / "model.pkl"
    sys.modules[M3AETrainState.__module__] = sys.modules.get(M3AETrainState.__module__, type(sys)("stand_in"))
    sys.modules[M3AETrainState.__module__].M3AETrainState = M3AETrainState  # type: ignore[attr-defined]
    file.write_bytes(pickle.dumps(content))
    with pytest.raises(SystemExit):
        pickle.loads(file.read_bytes())
    full = convert.import_weights(file)
    plain = convert.import_weights(parity / "m3ae_params.pkl", overrides=SIZES)
    jax.tree.map(np.testing.assert_array_equal, full.params, plain.params)
    assert full.config.model.heads == full.config.m3ae.decoder_heads == 4
    assert full.config.m3ae.image_mask_ratio == 0.5
    assert full.config.data.image_size == 32 and full.config.data.max_text_tokens == 16
    assert full.config.data.image_mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize("suffix", ["pkl", "npz"])
@pytest.mark.parametrize("variant", ["m3ae", "m3ae_head", "mae_notype"])
def test_there_and_back_is_the_identity(parity: Path, tmp_path: Path, variant: str, suffix: str) -> None:
    converted = convert.import_weights(parity / f"{variant}_params.pkl", overrides=SIZES)
    stored = inference.Stored(converted.config, converted.params, 0, "", converted.vocabulary)
    file = tmp_path / f"back.{suffix}"
    report = convert.export_weights(stored, "m3ae", file)
    assert not report.unused and not report.notes
    theirs = dict(np.load(parity / f"{variant}_params.npz"))
    again = convert.import_weights(file, overrides=SIZES)
    jax.tree.map(np.testing.assert_array_equal, again.params, converted.params)
    if suffix == "npz":
        back = dict(np.load(file))
        assert back.keys() == theirs.keys()
        assert all(np.array_equal(back[name], theirs[name]) for name in theirs)


def test_heads_of_unknown_number_are_requested(parity: Path) -> None:
    file = parity / "m3ae_params.pkl"
    with pytest.raises(UserError, match=r"encoder \(64 wide\) has: give --config.model.heads=N"):
        convert.import_weights(file)
    with pytest.raises(UserError, match=r"decoder \(48 wide\) has: give --config.m3ae.decoder_heads=N"):
        convert.import_weights(file, overrides=SIZES[:1])


def test_another_vocabulary_is_refused_with_the_sizes(parity: Path) -> None:
    words = load_tokenizer("scenes").vocab_size
    with pytest.raises(UserError, match=rf"'scenes' has {words} words, the weights 128"):
        convert.import_weights(parity / "m3ae_params.pkl", overrides=[*SIZES, ("data.tokenizer", "scenes")])


def test_another_resolution_takes_other_positions(parity: Path) -> None:
    overrides = [*SIZES[:2], ("data.image_size", "64"), SIZES[3]]
    converted = convert.import_weights(parity / "m3ae_params.pkl", overrides=overrides)
    assert check.compare(converted).close


def test_a_wrong_conversion_is_seen(parity: Path) -> None:
    converted = convert.import_weights(
        parity / "m3ae_params.pkl", overrides=[*SIZES, ("model.layer_norm_epsilon", "0.05")]
    )
    assert not check.compare(converted).close
    assert "DIFFERENT" in check.compare(converted).text()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda flat: flat.pop("params/encoder/Block_1/LayerNorm_0/scale"),
            "has encoder/Block_0/LayerNorm_0/scale but",
        ),
        (
            lambda flat: flat.pop("params/encoder/LayerNorm_0/bias"),
            "lacks what the model needs: encoder/transformer/norm/bias",
        ),
        (lambda flat: flat.pop("params/decoder/LayerNorm_0/bias"), "a part of the decoder alone"),
        (lambda flat: flat.update({"params/adapter": np.zeros(3)}), "no place for: adapter"),
        (lambda flat: flat.pop("params/cls_token"), "no M3AE parameters"),
        (lambda flat: flat.update({"params/image_mask_embedding": np.zeros((1, 1, 7))}), r"is \[1, 1, 7\]"),
    ],
)
def test_a_file_that_does_not_fit_is_one_line(parity: Path, tmp_path: Path, change: Any, match: str) -> None:
    flat = flatten_dict(pickle.load((parity / "m3ae_params.pkl").open("rb")), sep="/")
    change(flat)
    file = tmp_path / "model.pkl"
    file.write_bytes(pickle.dumps(unflatten_dict(flat, sep="/")))
    with pytest.raises(UserError, match=match) as error:
        convert.import_weights(file, overrides=SIZES)
    assert "\n" not in str(error.value)


def test_a_fine_tuned_checkpoint(parity: Path, tmp_path: Path) -> None:
    params = pickle.load((parity / "mae_params.pkl").open("rb"))["params"]
    classifier = {"base_model": params, "Dense_0": {"kernel": np.zeros((64, 10), np.float32)}}
    file = tmp_path / "model.pkl"
    file.write_bytes(pickle.dumps({"params": classifier}))
    converted = convert.import_weights(file, overrides=SIZES)
    assert converted.report.unused == ["outside/Dense_0/kernel (of its classifier)"]


def test_a_converted_run_is_as_any_other(parity: Path, tmp_path: Path) -> None:
    converted = convert.import_weights(parity / "m3ae_params.pkl", overrides=SIZES)
    run = tmp_path / "run"
    convert.write_run(converted, run)
    config = config_lib.load(str(run / "config.json"))
    assert config_lib.difference(config, converted.config) == []
    fresh = jax.tree.map(lambda x: jax.numpy.zeros_like(x), converted.params)
    params = load_into(fresh, str(run), complete=True)
    jax.tree.map(np.testing.assert_array_equal, params, converted.params)
    jax.tree.map(np.testing.assert_array_equal, inference.read(str(run)).params, converted.params)
    with pytest.raises(UserError, match="holds a run already"):
        convert.write_run(converted, run)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "m3ae_jax.convert", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_the_command_line_both_ways(parity: Path, tmp_path: Path) -> None:
    sizes = [f"--config.{name}={value}" for name, value in SIZES]
    run, file = tmp_path / "run", tmp_path / "back.safetensors"
    done = command(f"--from={parity / 'm3ae_params.pkl'}", f"--workdir={run}", *sizes)
    assert done.returncode == 0, done.stderr
    for part in (
        "matched: 44",
        "missing, left fresh: 0",
        "unused: 0",
        "encoder/Block_{0..1}/",
        ": equal",
        "written to",
    ):
        assert part in done.stdout
    assert json.loads((run / "config.json").read_text())["model"]["heads"] == 4
    done = command(f"--from={run}", "--to=safetensors", f"--output={file}")
    assert done.returncode == 0, done.stderr
    again = convert.import_weights(file)
    jax.tree.map(np.testing.assert_array_equal, again.params, inference.read(str(run)).params)
    done = command(f"--from={parity / 'm3ae_params.pkl'}")
    assert done.returncode == 2 and "give --workdir" in done.stderr


@pytest.mark.parametrize("name", ["m3ae", "mae", "vitmae", "timm", "safetensors"])
def test_a_decoder_that_a_format_does_not_know_is_refused(name: str) -> None:
    config = config_lib.default()
    config.m3ae.decoder_attention = "cross"
    convert._check_expressible(convert.FORMATS[name], config, name, encoder_only=True)
    if name in ("timm", "safetensors"):  # without a decoder, and ours as it is
        convert._check_expressible(convert.FORMATS[name], config, name, encoder_only=False)
    else:
        with pytest.raises(UserError, match=r"m3ae\.decoder_attention='cross'.*--encoder_only leaves it out"):
            convert._check_expressible(convert.FORMATS[name], config, name, encoder_only=False)
