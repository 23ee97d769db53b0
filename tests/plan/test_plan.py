"""``--mode=plan`` with the real TPU compiler, and without it."""

import json
import logging
import sys

import pytest

from m3ae_jax import config as config_lib
from m3ae_jax.plan.plan import plan

SMALL = {
    "batch_size": "64",
    "model.width": "128",
    "model.depth": "3",
    "model.heads": "2",
    "m3ae.decoder_width": "128",
    "m3ae.decoder_depth": "1",
    "m3ae.decoder_heads": "2",
    "data.image_size": "64",
    "data.max_text_tokens": "8",
    "duration": "1000 steps",
}


def small(**changes):
    config = config_lib.default()
    config_lib.apply_overrides(config, list({**SMALL, **changes}.items()))
    return config


def test_without_the_compiler_the_closed_form_is_still_told(monkeypatch, tmp_path, caplog):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with caplog.at_level(logging.INFO, "m3ae_jax"):
        assert plan(small(), "small", tmp_path, "v5e:2x2", 0.0, search=False) == []
    assert "GFLOP an example" in caplog.text and "pip install libtpu" in caplog.text


@pytest.mark.slow
def test_a_plan_tells_what_fits_and_what_it_costs(tmp_path, caplog):
    pytest.importorskip("libtpu", reason="needs libtpu, the TPU compiler")
    with caplog.at_level(logging.INFO, "m3ae_jax"):
        (fits,) = plan(small(**{"mesh.preset": "fsdp"}), "small", tmp_path, "v5e:2x2", 1.5, search=False)
    assert fits.compiled.fits and 0 < fits.compiled.peak < 16 * 2**30
    kinds = {c.kind for c in fits.compiled.collectives}
    assert "all-gather" in kinds and kinds & {"reduce-scatter", "all-reduce"}
    (record,) = json.loads((tmp_path / "plan.json").read_text())
    assert record["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1} and record["compiled"]["fits"]
    assert record["estimate"]["cost"] == pytest.approx(1.5 * record["estimate"]["chip_hours"])
    assert "| v5e:2x2 | 1 x 4 x 1 | 16 | none | yes |" in (tmp_path / "plan.md").read_text()


@pytest.mark.slow
def test_what_does_not_fit_is_told_with_by_how_much(tmp_path):
    pytest.importorskip("libtpu", reason="needs libtpu, the TPU compiler")
    large = small(**{"batch_size": "65536", "data.max_text_tokens": "64"})
    (found,) = plan(large, "large", tmp_path, "v5e:1x1", 0.0, search=False)
    assert not found.compiled.fits and found.estimate is None
    assert found.compiled.missing > 2**30
    assert "GiB too much" in (tmp_path / "plan.md").read_text()
