"""Figures over seeds: intervals, differences in pairs, verdicts, the files."""

import json

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from m3ae_jax.errors import UserError
from m3ae_jax.sweep.budget import Budget
from m3ae_jax.sweep.grid import Axis, Run
from m3ae_jax.sweep.results import Results, RunResult, Summary

SIZE = Axis(("model.width",), (("64",), ("96",)))
DATA = Axis(("data.modalities",), (("image",), ("(image,text)",)))
FIGURE = "probe/trained/image/cls/accuracy"


def done(width, data, seed, accuracy):
    scalars = {FIGURE: accuracy, "probe/untrained/image/cls/accuracy": 0.2, "probe/pixels/accuracy": 0.25}
    scalars |= {"probe/majority": 0.1, "probe/trained/image/cls/l2": 0.01, "probe/pixels/l2": 0.1}
    return RunResult(Run({"width": width, "modalities": data}, seed, ()), Budget(10, 640, 2.5e12), scalars)


def all_done():
    runs = []
    for seed, luck in ((1, 0.3), (2, 0.0), (3, -0.2)):  # large beside the differences, as luck of the seed is
        runs += [done("64", "image", seed, 0.4 + luck), done("64", "image,text", seed, 0.5 + luck + 0.001 * seed)]
        runs += [done("96", "image", seed, 0.5 + luck), done("96", "image,text", seed, 0.5 + luck + 0.1 * (seed - 2))]
    return runs


def test_summary_is_students_t():
    values = [0.1, 0.4, 0.35]
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    summary = Summary.of(dict(enumerate(values)))
    assert (summary.mean - summary.interval, summary.mean + summary.interval) == pytest.approx((low, high))
    assert Summary.of({1: 0.5}).text() == "0.500" and Summary.of({1: 0.5}).verdict == "inconclusive"


def test_differences_are_paired_by_seed():
    results = Results([SIZE, DATA], all_done(), [], "")
    assert results.compared == "modalities" and results.figures == [FIGURE]
    small = (("width", "64"), ("modalities", "image,text"))
    difference = results.difference(small, FIGURE)
    assert difference.mean == pytest.approx(0.102) and difference.interval < 0.01 and difference.verdict == "higher"
    large = results.difference((("width", "96"), ("modalities", "image,text")), FIGURE)
    assert large.mean == pytest.approx(0.0) and large.verdict == "inconclusive"
    assert results.difference((("width", "64"), ("modalities", "image")), FIGURE) is None
    other = Results([SIZE, DATA], all_done(), [], "width").difference(
        (("width", "96"), ("modalities", "image")), FIGURE
    )
    assert other.mean == pytest.approx(0.1) and other.verdict == "higher"


def test_a_missing_run_leaves_its_seed_out():
    results = Results(
        [SIZE, DATA], [o for o in all_done() if (o.run.seed, o.run.values["modalities"]) != (2, "image")], [], ""
    )
    difference = results.difference((("width", "64"), ("modalities", "image,text")), FIGURE)
    assert sorted(difference.values) == [1, 3]


def test_table_has_baselines_and_is_markdown():
    lines = Results([SIZE, DATA], all_done(), [], "").table().splitlines()
    assert len({line.count("|") for line in lines}) == 1 and len(lines) == 2 + 4
    assert "| untrained | pixels | majority |" in lines[0]
    assert lines[3].startswith("| 64 | image,text | 3 | 10 | 2.5 | 0.535 ± ") and "| 0.200 ± 0.000 |" in lines[3]
    assert "higher" in lines[3] and "inconclusive" in lines[5]


def test_files(tmp_path):
    results = Results([SIZE, DATA], all_done(), [], "")
    results.save(tmp_path, {"config": "x.py"}, "title with $ and _")
    record = json.loads((tmp_path / "results.json").read_text())
    assert len(record["runs"]) == 12 and record["config"] == "x.py" and record["runs"][0]["scalars"][FIGURE] == 0.7
    pair = record["points"][1]["figures"][FIGURE]["paired"]
    assert pair["difference"] == pytest.approx(0.102) and pair["verdict"] == "higher"
    assert (tmp_path / "results.md").read_text().strip() == results.table()
    assert np.asarray(Image.open(tmp_path / "results.png").convert("L")).std() > 5


def test_of_figures_that_not_all_have_each_run_shows_its_first(tmp_path):
    better = "probe/trained/image/matched"
    runs = all_done()
    for one in runs:
        if one.run.values["modalities"] == "image,text":
            one.scalars.update({better: one.scalars[FIGURE] + 0.2, "probe/untrained/image/matched": 0.3})
    results = Results([SIZE, DATA], runs, [f"{better}|{FIGURE}"], "")
    lines = results.table().splitlines()
    assert f"| {better} or {FIGURE} | untrained |" in lines[0] and len({line.count("|") for line in lines}) == 1
    assert "| 0.433 ± " in lines[2] and "| 0.200 ± 0.000 |" in lines[2]
    assert "| 0.735 ± " in lines[3] and "| 0.300 ± 0.000 |" in lines[3] and "| +0.302 ± " in lines[3]
    results.save(tmp_path, {}, "of two")
    with pytest.raises(UserError, match="--figures='matchd'"):
        Results([SIZE, DATA], runs, [f"{FIGURE}|matchd"], "")


def test_one_point_and_one_seed_are_drawn(tmp_path):
    one = RunResult(Run({}, 1, ()), Budget(1, 1, 1.0), {"knn/k=1": 0.5})
    results = Results([], [one], [], "")
    results.save(tmp_path, {}, "one")
    assert results.figures == ["knn/k=1"] and "| 1 | 1 |" in results.table()
    assert json.loads((tmp_path / "results.json").read_text())["points"][0]["figures"]["knn/k=1"]["interval"] is None


@pytest.mark.parametrize(
    ("figures", "compare", "message"),
    [
        (["probe/trained/image/cls/acuracy"], "", "did you mean 'probe/trained/image/cls/accuracy'"),
        ([], "modality", "--compare="),
    ],
)
def test_wrong_names_are_refused(figures, compare, message):
    with pytest.raises(UserError, match=message):
        Results([SIZE, DATA], all_done(), figures, compare)


def test_figures_without_overlap_are_not_shown_by_themselves_and_have_their_own_baselines():
    runs = all_done()
    for run in runs:
        run.scalars.update({f"{name}/without_overlap": value / 2 for name, value in list(run.scalars.items())})
    assert Results([SIZE, DATA], runs, [], "").figures == [FIGURE]
    named = Results([SIZE, DATA], runs, [f"{FIGURE}/without_overlap"], "")
    assert named.baselines(named.figures[0]) == [
        "probe/untrained/image/cls/accuracy/without_overlap",
        "probe/pixels/accuracy/without_overlap",
        "probe/majority/without_overlap",
    ]
