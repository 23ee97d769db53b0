"""The benchmarks run, small, and say what they measured; no figure is judged."""

import ast
import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from m3ae_jax.benchmark import (
    checkpoint,
    compare,
    encode,
    end_to_end,
    features,
    guard,
    index,
    init,
    input,
    peer,
    step,
    timing,
)
from m3ae_jax.benchmark.peers import m3ae, m3ae_256
from m3ae_jax.config import apply_overrides, default, load, resolve
from m3ae_jax.data.order import hidden_count
from m3ae_jax.errors import UserError
from m3ae_jax.objectives.base import build
from m3ae_jax.parallel.mesh import make_mesh
from m3ae_jax.train.flops import matmul_flops

BENCHMARK = Path(timing.__file__).parent
OBJECTIVES = ("m3ae", "mae", "mamo", "simla", "fourm")
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef


def config():
    c = default()
    c.data.image_size, c.data.patch_size, c.data.max_text_tokens = 32, 8, 16
    return resolve(c)


def test_the_input_benchmark_measures_every_stage(monkeypatch):
    monkeypatch.setattr(input, "_PICTURES", 80)
    monkeypatch.setattr(input, "_SECONDS", 0.0)
    figures = input.measure(config(), repeats=2)
    assert list(figures.stages) == ["read", "draw", "decode", "crop and resize", "patch", "tokenize", "mask"]
    assert min(figures.stages.values()) > 0 and len(figures.rates) == 2 and min(figures.rates) > 0
    text = figures.text()
    assert "80 JPEGs of 256 px" in text and "to 32 px and at most 16 tokens" in text
    assert json.loads(json.dumps(figures.record()))["rate"] == pytest.approx(figures.rate)


def test_the_index_benchmark_goes_on_at_nine_tenths():
    figures = index.measure(config(), records=1000)
    assert figures.records == 1000 and figures.position == 896
    assert "1,000 lines of text: indexed in" in figures.text()
    assert json.loads(json.dumps(figures.record()))["position"] == 896


def test_the_features_benchmark_times_both_classifiers():
    figures = features.measure(repeats=2, examples=120, width=8)
    assert [t.classes for t in figures.timings] == [15, 100]
    for t in figures.timings:
        assert len(t.knn_seconds) == len(t.probe_seconds) == 2 and min(t.knn_seconds) > 0
        assert 1 / t.classes < t.probe_accuracy < 0.9  # to be learnt, and not without mistakes
    assert "120 training and 120 test features of 8 numbers" in figures.text()
    assert json.loads(json.dumps(figures.record()))["timings"][1]["classes"] == 100


def small(**fields):
    c = config()
    c.data.tokenizer, c.batch_size = "scenes", 8
    c.model.width, c.model.depth, c.model.heads = 16, 1, 2
    c.m3ae.decoder_width, c.m3ae.decoder_depth, c.m3ae.decoder_heads = 16, 1, 2
    for name, value in fields.items():
        c.data[name] = value
    return c


def test_a_ready_batch_is_masked_as_the_config_says():
    c = small()
    batch = step.ready_batch(c, build(c, 50), 1, 50, caption_tokens=6.0)
    ((name, part),) = batch.items()
    image, text = part["groups"]["image"], part["groups"]["text"]
    assert name == "image+text" and part["example"]["valid"].all()
    assert image["visible"]["value"].shape == (8, 4, 192) and image["target"]["valid"].all()
    length = text["visible"]["valid"].sum(1) + text["target"]["valid"].sum(1)
    assert len(set(length)) > 1 and length.min() >= 1 and length.max() <= 16
    np.testing.assert_array_equal(text["target"]["valid"].sum(1), hidden_count(length, 0.75))
    for group in (image, text):
        for row in range(8):
            places = [p for tokens in group.values() for p in tokens["position"][row][tokens["valid"][row]]]
            assert sorted(places) == list(range(len(places)))  # each real token once
    assert text["target"]["value"].max() < 50
    slots = {kind: sum(g[kind]["valid"].shape[1] for g in (image, text)) for kind in ("visible", "target")}
    shares, real = step.padding(batch), step.tokens(batch)
    assert real == 8 * 16 + length.sum()
    assert shares["decoder"] == pytest.approx(1 - real / (8 * sum(slots.values())))
    assert 0 < shares["encoder"] < 1


def test_two_runs_are_compared_figure_by_figure(tmp_path):
    old = {"what": "step", "device": "1 cpu", "step": {"seconds": [2.0, 4.0, 9.0]}, "mfu": 0.5, "against": None}
    new = {"what": "step", "device": "2 cpu", "step": {"seconds": [2.0]}, "mfu": 0.25, "against": {"seconds": [1.0]}}
    lines = compare.table(old, new).splitlines()
    assert "1 cpu -> 2 cpu: not the same" in lines[0]
    assert lines[1].split() == ["step.seconds", "4", "->", "2", "x", "0.500"] and lines[2].endswith("x 0.500")
    path = tmp_path / "old.json"
    path.write_text(json.dumps(old))
    assert compare.load(path, "step") == old
    with pytest.raises(UserError, match=r"is of --what=step, not of --what=input"):
        compare.load(path, "input")
    for text in ("{", "[1]"):
        path.write_text(text)
        with pytest.raises(UserError, match=r"--compare="):
            compare.load(path, "step")


@pytest.mark.slow
def test_the_step_benchmark_measures_without_tensorflow(monkeypatch):
    monkeypatch.setattr(timing, "_ROUND_SECONDS", 0.0)
    monkeypatch.setattr(timing, "_FLOAT32_SIDE", 64)
    figures = step.measure(small(), repeats=2, caption_tokens=6.0)
    assert len(figures.step.seconds) == len(figures.matmul_flops_per_second) == 2 and min(figures.step.seconds) > 0
    assert figures.step.examples_per_second == pytest.approx(8 / np.median(figures.step.seconds))
    assert figures.temporary_bytes > 0 and figures.argument_bytes > 0 and figures.flops_per_example > 0
    assert "MFU" in figures.text() and json.loads(json.dumps(figures.record()))["devices"] == figures.devices
    # Beside a program that takes twice as long.
    twice = step.Timed.of([2 * s for s in figures.step.seconds], 8, None)
    beside = dataclasses.replace(figures, against=twice, against_name="other")
    assert "2.00 x its examples/s" in beside.text()
    program = "import sys; sys.modules['tensorflow'] = None; from m3ae_jax.benchmark import step, compare"
    program += "; from m3ae_jax.benchmark.peers import m3ae, vit_mae"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.slow
def test_another_config_of_ours_is_timed_in_turns_at_the_same_sizes(monkeypatch):
    monkeypatch.setattr(timing, "_ROUND_SECONDS", 0.0)
    monkeypatch.setattr(timing, "_FLOAT32_SIDE", 64)
    config = small()
    figures = step.measure(config, repeats=1, against="config=mae")
    assert figures.against_name == "config mae" and figures.against is not None
    assert 0 < figures.against_flops_per_example != figures.flops_per_example
    assert re.search(r"cost +[\d.]+ x its matrix products, [\d.]+ x its time: [\d.]+ x what", figures.text())
    with pytest.raises(UserError, match="nosuch"):
        step.measure(config, repeats=1, against="config=nosuch")


def test_the_other_program_is_of_pictures_alone():
    with pytest.raises(
        UserError, match=r"--against='vitmae' is not one of m3ae, m3ae_256, vit_mae; did you mean 'vit_mae'"
    ):
        step.measure(small(), repeats=1, against="vitmae")
    with pytest.raises(UserError, match=r"take --config=mae"):
        step.measure(small(), repeats=1, against="vit_mae")


def test_a_peer_is_refused_what_it_does_not_compute():
    for change, match in (
        ({"objective": "mine:Objective"}, r"--against=m3ae_256 with objective='mine:Objective': it computes what m3ae"),
        ({"data.modalities": ("image",)}, r"--against=m3ae_256 with data\.modalities=\('image',\)"),
    ):
        c = small()
        c.update_from_flattened_dict(change)
        with pytest.raises(UserError, match=match):
            peer.build("m3ae_256", c, 25.0, devices=1)


def named(tree):
    """Names and texts in a module's code, docstrings left out."""
    for node in ast.walk(tree):
        body = getattr(node, "body", [])
        if isinstance(body, list) and isinstance(node, ast.Module | ast.ClassDef | FUNCTIONS):
            node.body = [x for x in body if not (isinstance(x, ast.Expr) and isinstance(x.value, ast.Constant))]
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.ImportFrom):
            yield node.module
        elif isinstance(node, ast.alias):
            yield from (node.name, node.asname or "")
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.ClassDef | FUNCTIONS):
            yield node.name


def objectives_in(source):
    names = (name.lower().replace("m3ae_jax", "") for name in named(ast.parse(source)))
    return [name for name in names if any(objective in name for objective in OBJECTIVES)]


@pytest.mark.parametrize("path", sorted(BENCHMARK.glob("*.py")), ids=lambda path: path.name)
def test_only_peers_name_an_objective(path):
    assert not objectives_in(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "source",
    ["x = 'm3ae'", "from m3ae_jax.objectives.m3ae import f", "import simla", "x.vit_mae", "class Mamo: pass"],
)
def test_the_check_of_names_sees_them(source):
    assert objectives_in(source)
    assert not objectives_in('"""Of M3AE."""\nimport m3ae_jax.config as c\nx = "m3ae_jax.data"  # as MAE')


def test_the_command_lists_the_peers():
    assert peer.names() == ["m3ae", "m3ae_256", "vit_mae"]
    command = [sys.executable, "-m", "m3ae_jax.benchmark", "--what=step", "--against=mae"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "--against='mae' is not one of m3ae, m3ae_256, vit_mae" in done.stderr


@pytest.mark.parametrize(
    ("size", "tokens", "gigaflops"),
    [("small", 64, 58.3), ("small", 256, 118.7), ("base", 64, 84.2), ("base", 256, 163.4)],
)
def test_the_m3ae_reference_asks_for_its_published_operations(size, tokens, gigaflops):
    """Closed forms of the reference's own code at 224 px, ratios 0.75, 30,522 words; GFLOP of three forward passes."""
    c = load(f"configs/{size}.py")
    c.data.image_size, c.batch_size = 224, 1
    reference = {64: m3ae, 256: m3ae_256}[tokens].Step(resolve(c), 25.0)
    params = jax.eval_shape(reference.init)
    flops = 3 * matmul_flops(reference.loss, params, jax.random.key(0), reference.batch)
    assert flops / 1e9 == pytest.approx(gigaflops, rel=0.002)


@pytest.mark.slow
def test_the_m3ae_reference_trains_beside_ours(monkeypatch):
    monkeypatch.setattr(timing, "_ROUND_SECONDS", 0.0)
    monkeypatch.setattr(timing, "_FLOAT32_SIDE", 64)
    monkeypatch.setattr(m3ae, "BERT_VOCABULARY", 50)
    monkeypatch.setattr(step, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
    figures = step.measure(small(), repeats=2, caption_tokens=6.0, against="m3ae")
    assert len(figures.against.seconds) == 2 and "text length 64" in figures.text()
    with pytest.raises(UserError, match=r"take --config=base"):
        step.measure(small(modalities=("image",)), repeats=1, against="m3ae")
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"--against=m3ae on 8 devices"):
        step.measure(small(), repeats=1, against="m3ae")


@pytest.mark.slow
def test_vit_mae_trains_beside_ours(tmp_path):
    if importlib.util.find_spec("transformers") is None or importlib.util.find_spec("torch") is None:
        pytest.skip("needs PyTorch and transformers: pip install -e '.[parity]'")
    # In a process of its own, as a user runs it: PyTorch's triton crashes where TensorFlow has been loaded before it.
    sizes = [f"{group}{name}" for group in ("model.", "m3ae.decoder_") for name in ("width=16", "depth=1", "heads=2")]
    command = [sys.executable, "-m", "m3ae_jax.benchmark", "--what=step", "--against=vit_mae", "--repeats=2"]
    command += ["--config.data.modalities=image", "--config.batch_size=8", f"--output={tmp_path / 'figures.json'}"]
    done = subprocess.run([*command, *(f"--config.{size}" for size in sizes)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    against = json.loads((tmp_path / "figures.json").read_text())["against"]
    assert len(against["seconds"]) == 2 and min(against["seconds"]) > 0 and "ViTMAE" in done.stdout


@pytest.mark.slow
def test_the_guard_benchmark_compares_two_compiled_steps():
    figures = guard.measure(small(), repeats=1, steps=2)
    sides = figures.sides
    assert min(side.flops for side in sides.values()) > 0
    assert {side.calls_to_the_host for side in sides.values()} == {0}  # nothing makes the host wait
    assert "compiled FLOPs" in figures.text() and json.loads(json.dumps(figures.record()))["steps"] == 2


@pytest.mark.slow
def test_making_saving_and_restoring_a_state_are_timed():
    made = init.measure(small(), repeats=2)
    assert len(made.run_seconds) == 2 and min(made.compile_seconds) > 0 and made.state_bytes > 12 * made.parameters
    saved = checkpoint.measure(small(), repeats=2)
    assert all(0 < wait <= all_ for wait, all_ in zip(saved.wait_seconds, saved.save_seconds, strict=True))
    assert saved.state_bytes == made.state_bytes and saved.file_bytes > 0 and min(saved.restore_seconds) > 0
    for figures, words in ((made, f"{made.parameters:,} parameters"), (saved, "the loop waits")):
        assert words in figures.text() and json.loads(json.dumps(figures.record()))


@pytest.mark.slow
def test_encoding_is_timed_by_batch_size(monkeypatch):
    monkeypatch.setattr(timing, "_FLOAT32_SIDE", 64)
    monkeypatch.setattr(timing, "_ROUND_SECONDS", 0.0)
    c = small()
    figures = encode.measure(c, repeats=2, sizes=(1, 4))
    assert [rate.batch_size for rate in figures.rates] == [1, 4] and figures.tokens == 16 + 16
    assert all(len(rate.seconds) == 2 and rate.examples_per_second > 0 for rate in figures.rates)
    # One layer of width 16: products with weights, and attention among 33 tokens; patches of 192 numbers.
    assert figures.flops_per_example == 2 * 33 * 12 * 16**2 + 4 * 33**2 * 16 + 2 * 16 * 192 * 16
    assert "32 visible tokens" in figures.text() and json.loads(json.dumps(figures.record()))


@pytest.mark.slow
def test_training_with_data_is_timed_beside_ready_batches():
    sizes = {"width": "16", "depth": "1", "heads": "2"}
    fields = {group + name: size for group in ("model.", "m3ae.decoder_") for name, size in sizes.items()}
    fields["batch_size"] = "8"
    c = load("configs/tiny.py")
    apply_overrides(c, list(fields.items()))
    figures = end_to_end.measure(resolve(c), repeats=2, start=("configs/tiny.py", list(fields.items())), steps=3)
    assert len(figures.step_seconds) == len(figures.ready_seconds) == 2 and 0 <= figures.wait_share < 1
    assert list(figures.start) == ["cold", "cached"]
    for parts in figures.start.values():
        assert list(parts) == ["imports", "data", "state", "evaluation", "batch", "compile", "other"]
        assert min(parts.values()) >= 0 and parts["imports"] > 0
    assert "to the end of the first step" in figures.text() and json.loads(json.dumps(figures.record()))
    with pytest.raises(UserError, match=r"ended with 2: error: .*batch_sizes"):
        end_to_end.measure(resolve(c), repeats=1, start=("configs/tiny.py", [("batch_sizes", "8")]))
