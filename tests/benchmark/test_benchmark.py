"""The benchmarks run, small, and say what they measured; no figure is judged."""

import json

import pytest

from m3ae_jax.benchmark import features, guard, index, input
from m3ae_jax.config import default, resolve


def config():
    c = default()
    c.data.image_size, c.data.patch_size, c.data.max_text_tokens = 32, 8, 16
    return resolve(c)


def test_the_input_benchmark_measures_every_stage(monkeypatch):
    monkeypatch.setattr(input, "_PICTURES", 80)
    monkeypatch.setattr(input, "_SECONDS", 0.0)
    figures = input.measure(config(), repeats=2)
    assert list(figures.stages) == ["read", "draw", "decode", "crop and resize", "patch", "tokenize", "mask and batch"]
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
    for timing in figures.timings:
        assert len(timing.knn_seconds) == len(timing.probe_seconds) == 2 and min(timing.knn_seconds) > 0
        assert 1 / timing.classes < timing.probe_accuracy < 0.9  # to be learnt, and not without mistakes
    assert "120 training and 120 test features of 8 numbers" in figures.text()
    assert json.loads(json.dumps(figures.record()))["timings"][1]["classes"] == 100


@pytest.mark.slow
def test_the_guard_benchmark_compares_two_compiled_steps():
    c = config()
    c.data.tokenizer, c.batch_size = "scenes", 8
    c.model.width, c.model.depth, c.model.heads = 16, 1, 2
    c.model.decoder_width, c.model.decoder_depth, c.model.decoder_heads = 16, 1, 2
    figures = guard.measure(c, repeats=1, steps=2)
    sides = figures.sides
    assert min(side.flops for side in sides.values()) > 0
    assert {side.calls_to_the_host for side in sides.values()} == {0}  # nothing makes the host wait
    assert "compiled FLOPs" in figures.text() and json.loads(json.dumps(figures.record()))["steps"] == 2
