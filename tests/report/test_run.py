"""The run's page: whatever is in the folder, and whatever is not, it shows what happened."""

import base64
import io
import itertools
import json
import logging
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m3ae_jax.errors import UserError
from m3ae_jax.evals.base import Data, Result
from m3ae_jax.report import charts, measured, page, results
from m3ae_jax.report.charts import Line, Series
from m3ae_jax.report.run import build_run
from tests.report.test_page import HOSTILE, SCRIPT, check, cut_off, load_in_browser

CONFIG = {"batch_size": 64, "duration": "2000 steps", "data": {"train": {"path": "", "crop": [0.2, 1]}, "mixture": {}}}
NOT_MADE = "could not be made"
GROUPS = ("embeddings", "encoder", "decoder", "image_head", "text_head")


def row(step: int, kinds: int = len(GROUPS)) -> dict[str, float | None]:
    """What the loop logs at a step; the figures move as a run's do."""
    wave = math.sin(step / 7) * 0.05
    figures: dict[str, float | None] = {
        "loss": 7 * math.exp(-step / 300) + 0.5 + wave,
        "image_loss": 1.2 * math.exp(-step / 200) + 0.1,
        "text_loss": 4.7 * math.exp(-step / 400) + 0.3,
        "text_accuracy": 1 - math.exp(-step / 500),
        "learning_rate": 1.5e-4 * min(step / 100, 1.0),
        "gradient_norm": 5 * math.exp(-step / 500) + 0.2 + abs(wave),
        "parameter_norm": 40 + step / 100,
        "examples_per_second": 290 + 20 * wave,
        "examples_per_second_per_chip": 36 + 3 * wave,
        "mfu": 0.41 + wave / 20,
        "teraflops_per_second_per_chip": 410.0,
        "data_wait_share": 0.01,
        "replaced_examples": float(step % 3 == 0),
        "replaced/does_not_decode": float(step % 3 == 0),
        "skipped_steps": float(step == 900),
        "share/photos": 0.75,
        "epochs/photos": step / 900,
        "image_loss/photos": 0.3,
        "image_loss/clip art": 0.2,
    }
    for i in range(kinds):
        name = GROUPS[i % len(GROUPS)] + ("" if i < len(GROUPS) else f"_{i}")
        figures |= {f"gradient_norm/{name}": 0.1 + i + abs(wave), f"parameter_norm/{name}": 10.0 + i}
    shares = {"step": 0.9, "data_wait": 0.01, "startup": 0.02, "compile": 0.03, "evaluation": 0.03, "checkpoint": 0.01}
    tokens = {"image_visible": 49.0, "image_target": 147.0, "text_visible": 3.2, "text_target": 9.5}
    return {
        "step": step,
        **{f"train/{name}": value for name, value in figures.items()},
        **{f"time/{name}": value for name, value in shares.items()},
        **{f"tokens/{name}": value for name, value in tokens.items()},
        "memory/host_gib": 3.5,
        "memory/device_gib": 61.0,
    }


def validation(step: int) -> dict[str, float]:
    return {
        "step": step,
        "val/loss": 7 * math.exp(-step / 300) + 0.6 + 0.3 * (step == 2000),
        "val/image_loss": 0.2,
        "val/text_loss": 0.4,
        "val/text_accuracy": 0.8,
        "prior/image_loss": 0.63,
        "prior/text_loss": 3.2,
    }


def event(minute: int, step: int | None, kind: str, text: str) -> dict[str, object]:
    return {
        "time": f"2026-11-23T{10 + minute // 60:02d}:{minute % 60:02d}:13Z",
        "step": step,
        "kind": kind,
        "text": text,
    }


EVENTS = [
    event(0, 0, "started", "2000 steps of 64 examples"),
    event(5, 500, "saved", "checkpoint"),
    *(event(6, 880 + i, "skipped", f"step {880 + i} was skipped: its loss was not finite") for i in range(3)),
    event(10, 1000, "saved", "checkpoint"),
    event(11, 1010, "preempted", "stopped at step 1010, saved; the same command goes on"),
    event(71, 1000, "resumed", "going on from step 1000 of runs/x"),
    event(80, 2000, "evaluated", "  validation at step 2000: loss 0.9"),
    event(81, 2000, "finished", "all 2000 steps are done"),
]


def lines(path: Path, values) -> None:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))


def sheet(path: Path, size: tuple[int, int] = (300, 200), seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1] // 20 + 1, size[0] // 20 + 1, 3), np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path)


def make_run(folder: Path, every: int = 20) -> Path:
    """A folder such as a run leaves it: stopped once, and gone on with."""
    rows = [row(step) for step in (1, *range(every, 2001, every))]
    rows += [validation(step) for step in range(0, 2001, 250)]
    folder.mkdir(parents=True, exist_ok=True)
    lines(folder / "metrics.jsonl", sorted(rows, key=lambda one: one["step"]))
    lines(folder / "events.jsonl", EVENTS)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for step in range(0, 2001, 100):
        sheet(folder / "pictures" / f"step_{step:08d}.png", seed=step)
    (folder / "checkpoints" / "2000").mkdir(parents=True)
    add_evaluations(folder / "evals")
    add_replay(folder / "replay")
    return folder


def add_evaluations(folder: Path) -> None:
    folder.mkdir()
    for step in (1000, 2000):
        (folder / f"grounding_{step}.json").write_text(json.dumps({"step": step, "grounding/val/color": step / 4000}))
        (folder / f"grounding_{step}.md").write_text("| split | n |\n|---|---|\n| val | 480 |\n")
    (folder / "validation_2000.json").write_text(json.dumps({"step": 2000, "val/loss": None}))
    (folder / "linear_probe_2000.json").write_text(json.dumps({"step": 2000, "top1": 0.6}))
    (folder / "linear_probe_2000.md").write_text("top-1\n  of all   60.0 %\n")


def add_replay(folder: Path, **changes: object) -> None:
    record = {
        "step": 881,
        "from_step": 500,
        "loss": None,
        "recorded_loss": None,
        "equal": True,
        "verdict": "its loss or gradient was not finite",
        "terms": {"loss": None, "image_loss": 0.25},
        "gradient_norms": {"all": None, "encoder/blocks/0": 0.5, "encoder/blocks/1": 1.0},
        "worst": [{"position": 56321, "source": "photos", "index": 1234, "loss": None, "caption": "a red bus"}],
    }
    sheet(folder / "step_881.png")
    (folder / "step_881.json").write_text(json.dumps(record | changes))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "night")


def built(folder: Path):
    """The page's text, and its parsed form; nothing was too strange for a part."""
    text = build_run(folder).read_text(encoding="utf-8")
    assert NOT_MADE not in text
    return text, check(text)


def section(text: str, anchor: str) -> str:
    """One section of a page."""
    return re.search(rf'<section id="{anchor}">(.*?)</section>', text, re.DOTALL)[1]


# --- what is in the folder is on the page ------------------------------------------------------------------


def test_a_whole_run_has_every_part(whole):
    text, parsed = built(whole)
    anchors = [value for value in parsed.references if value.startswith("#")]
    names = ["00-run", "05-events", "20-curves", "25-throughput", "30-reconstructions", "40-evaluations"]
    assert anchors == [f"#{name}" for name in (*names, "60-replay", "80-config")]
    assert "<h1>night</h1>" in text and len(text) < 5e6


def test_the_first_part_shows_the_status(whole):
    part = section(built(whole)[0], "00-run")
    for expected in (
        "finished at 2026-11-23 11:21:13 UTC", "2,000 of 2,000 (100 %)", "128,000", "21m00s", "<td dir=\"auto\">2</td>",
        "0.6205 at step 1,750", "33<bdi> (does not decode 33)</bdi>", "newest checkpoint",
    ):  # fmt: skip
        assert expected in part, expected
    assert "alert" not in part


def test_events_are_listed_newest_first_and_skipped_steps_together(whole):
    part = section(built(whole)[0], "05-events")
    assert re.findall(r"finished|resumed|preempted|started", part) == ["finished", "resumed", "preempted", "started"]
    assert "3 times since step 880; the last: " in part and "step 881 was" not in part
    assert part.count("<tr>") == 1 + len(EVENTS) - 2


def test_of_many_events_the_newest_are_shown(tmp_path):
    lines(tmp_path / "events.jsonl", [event(i // 10, i, "saved", f"checkpoint {i}") for i in range(500)])
    part = section(built(tmp_path)[0], "05-events")
    assert "300 older ones are left out" in part and part.count("checkpoint ") == 200
    assert "checkpoint 300<" in part and "checkpoint 299<" not in part


@pytest.mark.parametrize(
    ("ending", "status", "alarm"),
    [
        (event(12, 1010, "failed", "UserError: all is lost"), "failed at", "failed at step 1,010: "),
        (event(12, None, "stopped", "interrupted"), "stopped at", "stopped: "),
        (event(12, 7, "preempted", "the same command goes on"), "stopped (preempted) at", "preempted at step 7: "),
        (event(12, 7, "stalled", "nothing for 900 s"), "running, or killed without a word", "stalled at step 7: "),
        (event(12, 7, "saved", "checkpoint"), "running, or killed without a word; last heard of at 2026-", ""),
    ],
)
def test_how_it_ended_is_said_on_top(tmp_path, ending, status, alarm):
    late = event(13, 7, "warning", "a thread was late")  # after the end it changes nothing
    follow = [late] if ending["kind"] in ("failed", "stopped") else []
    lines(tmp_path / "events.jsonl", [EVENTS[0], ending, *follow])
    part = section(built(tmp_path)[0], "00-run")
    assert status in part
    assert ('class="alert bad"' in part) == bool(alarm)
    assert f"{alarm}<bdi>{ending['text']}</bdi>" in part or not alarm
    assert ("same command begins anew" in part) == bool(alarm)
    (tmp_path / "checkpoints" / "1000").mkdir(parents=True)
    (tmp_path / "checkpoints" / "1010.tmp").mkdir()
    assert ("goes on from the checkpoint of step 1,000." in section(built(tmp_path)[0], "00-run")) == bool(alarm)


def test_a_run_that_goes_on_is_no_longer_stopped(tmp_path):
    lines(tmp_path / "events.jsonl", EVENTS[:-2])
    lines(tmp_path / "metrics.jsonl", [row(1010)])
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    for seconds, expected in ((1e9, "1,000 of 2,000 (50 %)"), (2e9, "1,010 of 2,000 (50.5 %)")):
        os.utime(tmp_path / "metrics.jsonl", (seconds, seconds))
        part = section(built(tmp_path)[0], "00-run")
        assert "running" in part and "alert" not in part
        assert expected in part, "it fell back to its checkpoint, then went on"


@pytest.mark.parametrize(
    ("duration", "events", "expected"),
    [
        ("2000 steps", [], "500 of 2,000 (25 %)"),
        ("64000 examples", [], "500 of 1,000 (50 %)"),
        ("3 epochs", [event(0, 0, "started", "700 steps of 64 examples")], "500 of 700 (71.4 %)"),
        ("3 epochs", [event(0, 500, "finished", "all 500 steps are done")], "500 of 500 (100 %)"),
        ("3 epochs", [event(0, 500, "saved", "700 steps of 64 examples")], '"auto">500<'),
        ("0 steps", [], '"auto">500<'),
        ("soon", [], '"auto">500<'),
        (None, [], '"auto">500<'),
    ],
)
def test_how_many_steps_there_are_to_do(tmp_path, duration, events, expected):
    lines(tmp_path / "metrics.jsonl", [row(500)])
    os.utime(tmp_path / "metrics.jsonl", (2e9, 2e9))  # after all events
    lines(tmp_path / "events.jsonl", events)
    (tmp_path / "config.json").write_text(json.dumps({"batch_size": 64, "duration": duration}))
    assert expected in section(built(tmp_path)[0], "00-run")


def test_rows_of_a_start_that_fell_back_do_not_count(tmp_path):
    rows = [row(step) for step in (100, 200, 300)]
    rows[2]["train/loss"] = 77.25
    lines(tmp_path / "metrics.jsonl", [*rows, row(101), {**row(200), "train/loss": 5.125}])
    text, _ = built(tmp_path)
    assert "5.125 at step 200" in text and "77.25" not in text


def test_curves_show_each_term_with_its_units(whole):
    part = section(built(whole)[0], "20-curves")
    titles = re.findall(r"<h4><bdi>(.*?)</bdi>", part)
    assert titles[:4] == ["loss", "image loss", "image loss, by source", "text loss"]
    assert titles[4:] == [
        "text accuracy", "learning rate", "gradient norm", "gradient norm, by group", "parameter norm",
        "parameter norm, by group",
    ]  # fmt: skip
    for expected in (
        "squared error per pixel value",
        "nats per word",
        "val 0.2",
        "prior 0.63",
        "| skipped steps",
        "clip art",
    ):
        assert expected in part, expected


def test_throughput_shows_where_the_time_went(whole):
    part = section(built(whole)[0], "25-throughput")
    for expected in (
        "examples/s",
        "MFU",
        "GiB",
        "startup 2",
        "checkpoint 1",
        ">image</td>",
        "196",
        "75 %",
    ):
        assert expected in part, expected


def test_a_figure_that_is_the_same_for_a_chip_is_shown_once():
    figure = {"train/examples_per_second": 5.0, "train/examples_per_second_per_chip": 5.0}
    metrics = charts.collect([{"step": step, **figure} for step in (1, 2)])
    assert "a chip" not in page.join(measured.throughput(metrics))


def test_of_many_groups_the_largest_are_drawn():
    metrics = charts.collect([row(step, kinds=40) for step in (1, 2)])
    drawn = page.join(measured.curves(metrics))
    assert "gradient norm, by group, the 16 largest of 40" in drawn
    assert "text_head_39 " in drawn and "embeddings_20 " not in drawn.partition("<details>")[0]


def test_evaluations_show_the_newest_text_and_all_steps(whole):
    part = section(built(whole)[0], "40-evaluations")
    assert re.findall("<h3>(.*?)</h3>", part) == [
        f"{n} at step 2,000" for n in ("grounding", "linear_probe", "validation")
    ]
    assert ">480</td>" in part, "a Markdown table is a table"
    assert "<pre>top-1\n  of all   60.0 %</pre>" in part
    assert all(expected in part for expected in ("step 1,000", "0.25", "not finite"))
    assert "0.6<" not in part, "one step's figures are in its text"


def test_a_replay_shows_its_result(whole):
    part = section(built(whole)[0], "60-replay")
    assert "Computed again from step 500: loss not finite. The run wrote the same." in part
    assert "Not finite: <bdi>all</bdi>" in part and "width:3.00em" in part and "a red bus" in part
    assert part.count("<img") == 1


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"loss": 0.123456789, "equal": None}, "loss 0.123456789. The run wrote no loss of this step"),
        ({"loss": 1.5, "recorded_loss": 2.5, "equal": False}, '<span class="bad">The run wrote 2.5.</span>'),
        ({"worst": None, "terms": [1], "gradient_norms": {}}, "The verdict on the step"),
    ],
)
def test_a_replay_that_differs(tmp_path, changes, expected):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "replay").mkdir()
    add_replay(tmp_path / "replay", **changes)
    assert expected in section(built(tmp_path)[0], "60-replay")


def test_the_config_is_a_table_of_dotted_names(whole):
    part = section(built(whole)[0], "80-config")
    assert "<details>" in part and "data.train.crop</th>" in part and "<code>[0.2, 1]</code>" in part
    assert "data.mixture</th>" in part and "<code>{}</code>" in part


# --- pictures ----------------------------------------------------------------------------------------------


def test_few_sheets_are_chosen_evenly_over_the_logarithm(whole):
    part = section(built(whole)[0], "30-reconstructions")
    steps = [int(step.replace(",", "")) for step in re.findall(r"<figcaption>Step ([\d,]+)", part)]
    assert steps[0] == 0 and steps[-1] == 2000 and steps == sorted(set(steps)) and 6 <= len(steps) <= 8
    assert steps[2] - steps[1] < steps[-1] - steps[-2]


@pytest.mark.parametrize("count", [0, 1, 2, 8, 9, 10, 1000])
def test_any_number_of_sheets(count):
    steps = list(range(0, 100 * count, 100))
    chosen = results.spread(steps)
    assert len(chosen) == len(set(chosen)) <= 8 and set(chosen) <= set(steps)
    assert chosen[:1] == steps[:1] and chosen[-1:] == steps[-1:]


def test_a_large_sheet_is_made_smaller_and_a_high_one_is_cut(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (900, 1300, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "step_1.png")
    shown = results.picture(tmp_path / "step_1.png", "noise", "Step 1")
    assert "image/jpeg" in shown and len(shown) < 1.4 * results._BYTES
    sheet(tmp_path / "step_2.png", (40, 7000))
    assert "The upper part alone" in results.picture(tmp_path / "step_2.png", "high", "Step 2")
    sheet(tmp_path / "step_3.png", (40, 70))
    small = results.picture(tmp_path / "step_3.png", "small", "Step 3")
    assert "image/png" in small and "upper part" not in small, "it is put in as it is"


def test_a_sheet_that_was_written_anew_is_shown_anew(tmp_path):
    sheet(tmp_path / "step_1.png", seed=1)
    before = results.picture(tmp_path / "step_1.png", "", "")
    assert before == results.picture(tmp_path / "step_1.png", "", "")
    sheet(tmp_path / "step_1.png", seed=2)
    os.utime(tmp_path / "step_1.png", ns=(1, 1))
    assert before != results.picture(tmp_path / "step_1.png", "", "")


def test_sheets_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    sheet(tmp_path / "pictures" / "step_00000001.png", (400, 400))
    whole = (tmp_path / "pictures" / "step_00000001.png").read_bytes()
    for step, data in enumerate((b"", b"no picture", whole[:2000], whole[:40], whole[:500] + b"\0" * 99 + whole[599:])):
        (tmp_path / "pictures" / f"step_{step:08d}.png").write_bytes(data)
    (tmp_path / "pictures" / "step_00000009.png").mkdir()
    part = section(built(tmp_path)[0], "30-reconstructions")
    assert part.count("cannot be shown") == 6


def test_pictures_of_evaluations_stand_below_their_tables(tmp_path):
    shape = (60, 90, 3)
    for step, value in ((1000, 10), (2000, 200)):
        drawn = {"maps": np.full(shape, value, np.uint8), "more_maps": np.full(shape, value + 1, np.uint8)}
        Result("tsne", {"tsne/n": 21.0}, "| a | b |\n|---|---|\n| c | 21 |", drawn).save(tmp_path / "evals", step)
    (tmp_path / "config.json").write_text("{}")
    part = section(built(tmp_path)[0], "40-evaluations")
    assert re.findall(r"<figcaption>(.*?)</figcaption>", part) == ["maps", "more maps"]
    assert part.index("<table") < part.index("<img")
    shown = [base64.b64decode(one) for one in re.findall(r'src="data:image/png;base64,([^"]*)"', part)]
    pixels = [np.asarray(Image.open(io.BytesIO(one))) for one in shown]
    assert [np.unique(one).tolist() for one in pixels] == [[200], [201]], "those of the newest step"
    assert all(one.shape == shape for one in pixels)


def test_item_13_evaluations_of_several_data_stand_beside_each_other(tmp_path):
    birds = Data("birds-0123ab", {"train": {"source": "folder", "path": "/birds", "split": "train", "examples": 1200}})
    fish = Data("fish-2-4567cd", {"test": {"source": "tfds", "path": HOSTILE[0], "examples": 7}, "odd": 3})
    shape = (60, 90, 3)
    for data, value in ((Data(), 0.125), (birds, 0.25), (fish, 0.5)):
        picture = {"map_one": np.full(shape, int(value * 100), np.uint8)}
        text = f"| a | b |\n|---|---|\n| c | {value} |\n\n2 of 7 test examples are in eval.train too."
        Result("linear_probe", {"linear_probe/accuracy": value}, text, picture).save(tmp_path / "evals", 20, data)
    Result("linear_probe", {"linear_probe/accuracy": 0.75}, "| a |", {}).save(tmp_path / "evals", 10, birds)
    (tmp_path / "config.json").write_text("{}")
    part = section(built(tmp_path)[0], "40-evaluations")
    assert re.findall("<h3>(.*?)</h3>", part) == [
        "linear_probe at step 20",
        "linear_probe at step 20, of birds-0123ab",
        "linear_probe at step 20, of fish-2-4567cd",
        "linear_probe, data beside each other",
    ]
    assert "train: folder, /birds, train, 1,200 examples" in part and "test: tfds, " in part
    assert part.count("<figcaption>map one</figcaption>") == 3, "each of its own data"
    assert part.count("2 of 7 test examples are in eval.train too.") == 3 and part.count("<pre") == 0
    beside = part[part.index("data beside each other") :]
    assert all(f"<th>{head}, step 20</th>" in beside for head in ("data unknown", "birds-0123ab", "fish-2-4567cd"))
    assert re.findall(r"\"number\"[^>]*>([0-9.]+)<", beside) == ["0.125", "0.25", "0.5"]
    steps = part[part.index("of birds-0123ab") : part.index("of fish-2-4567cd")]
    assert "<th>step 10</th>" in steps and "0.75" in steps


# --- charts ------------------------------------------------------------------------------------------------


def test_a_thinned_line_keeps_its_peaks_and_ends():
    values = np.sin(np.arange(100_000) / 900)
    values[[77_123, 12_345]] = 9, -9
    thin = charts.thinned(Series(np.arange(100_000), values), 600)
    assert len(thin.steps) <= 602 and (np.diff(thin.steps) > 0).all()
    assert (thin.values.max(), thin.values.min(), thin.steps[0], thin.steps[-1]) == (9, -9, 0, 99_999)
    assert np.array_equal(thin.values, values[thin.steps])


def coordinates(drawn: str) -> np.ndarray:
    """All points of absolute paths, `[N, 2]`."""
    return np.array([[float(x), float(y)] for x, y in re.findall(r"[ML](-?[\d.e+-]+) (-?[\d.e+-]+)", drawn)])


@pytest.mark.parametrize("seed", range(30))
def test_any_line_stays_within_its_frame(seed):
    draw = random.Random(seed)
    count = draw.choice([1, 2, 31, 2000])
    scale = 10.0 ** draw.randint(-30, 30)
    values = np.array([draw.choice([1, -1, 1, 0]) * scale * 10 ** draw.uniform(-3, 3) for _ in range(count)])
    values[draw.sample(range(count), count // 5)] = math.nan
    if seed % 3 == 0:
        values = np.abs(values) + scale
    steps = np.sort(np.array(draw.sample(range(10**6), count)))
    one = Line("any", Series(steps, values))
    drawn = charts.chart(
        "t", "u", [one], level=("prior", scale), skipped=[int(steps[0])], log_from=draw.choice([2, math.inf])
    )
    points = coordinates(drawn)
    assert np.isfinite(points).all()
    assert (points >= 0).all() and (points <= (460.05, 240.05)).all()
    points = coordinates(charts.stack("t", "u", [Line("a", Series(steps, np.abs(values))), one]))
    assert np.isfinite(points).all()


@pytest.mark.parametrize("values", [[math.nan], [0.0], [5.0, 5.0], [-1e-300, 1e300], [1e-5, 2e-5], [math.inf, 1.0]])
def test_strange_values_make_a_chart(values):
    metrics = charts.collect([{"step": i, "train/loss": value} for i, value in enumerate(values)])
    check_chart = page.join(measured.curves(metrics))
    assert "nan" not in check_chart and "inf" not in check_chart.replace("not finite", "")


def test_what_is_not_finite_is_a_cross():
    drawn = charts.chart("t", "u", [Line("a", Series(np.array([1, 2]), np.array([1.0, math.nan])))])
    assert "✕ not finite" in drawn and "a not finite" in drawn


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.0, "0"), (0.123456, "0.1235"), (290.123, "290.1"), (12345.6, "12,346"), (1.5e-4, "1.5e-4"), (-2e-7, "-2e-7"),
     (1e9, "1e9"), (math.nan, "not finite"), (-math.inf, "not finite"), (1.0, "1")],
)  # fmt: skip
def test_numbers_are_short(value, expected):
    assert charts.short(value) == expected


# --- whatever is wrong with the folder ---------------------------------------------------------------------


def test_a_folder_without_a_run_is_refused_in_a_line(tmp_path):
    (tmp_path / "log.txt").write_text("")
    with pytest.raises(UserError, match="holds no run") as error:
        build_run(tmp_path)
    assert "\n" not in str(error.value)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["log.txt"]


@pytest.mark.parametrize(
    "names",
    [("metrics.jsonl",), ("events.jsonl",), ("config.json",), ("events.jsonl", "config.json", "pictures"),
     ("config.json", "evals"), ("metrics.jsonl", "replay")],
)  # fmt: skip
def test_anything_may_be_missing(whole, tmp_path, names):
    for name in names:
        copy = shutil.copytree if (whole / name).is_dir() else shutil.copy
        copy(whole / name, tmp_path / name)
    built(tmp_path)


def test_parts_that_are_gone_leave_the_page_and_those_of_others_stay(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    page.write(folder, 10, "data_doctor", "Data doctor", page.paragraph("of another"))
    built(folder)
    shutil.rmtree(folder / "replay")
    (folder / "events.jsonl").unlink()
    text, _ = built(folder)
    assert "60-replay" not in text and "05-events" not in text and "of another" in text
    assert "unknown: there is no events.jsonl" in text


def test_files_cut_off_anywhere(whole, tmp_path):
    sizes = {name: (whole / name).stat().st_size for name in ("metrics.jsonl", "events.jsonl", "config.json")}
    for seed in range(12):
        draw = random.Random(seed)
        for name, size in sizes.items():
            cut = (whole / name).read_bytes()[: draw.randrange(min(size, 20_000))]
            (tmp_path / name).write_bytes(cut + draw.choice([b"", b"\0\0\0", b"\n", b"\xff\n"]))
        built(tmp_path)


STRANGE = (None, "text", -1, 1e308, 10**400, [], {"a": 1}, True, SCRIPT, math.nan, "\ud800")


@pytest.mark.parametrize("seed", range(12))
def test_whatever_json_the_files_hold(tmp_path, seed):
    draw = random.Random(seed)

    def spoilt(values: dict[str, object]) -> object:
        if draw.random() < 0.1:
            return draw.choice(STRANGE)
        return {key: draw.choice(STRANGE) if draw.random() < 0.1 else value for key, value in values.items()}

    lines(tmp_path / "metrics.jsonl", [spoilt(row(step)) for step in range(0, 100, 20)])
    lines(tmp_path / "events.jsonl", [spoilt(one) for one in EVENTS])
    (tmp_path / "config.json").write_text(json.dumps(spoilt(CONFIG)))
    add_evaluations(tmp_path / "evals")
    (tmp_path / "evals" / "grounding_2000.json").write_text(json.dumps(spoilt({"a": 1, "b": 2.5})))
    (tmp_path / "replay").mkdir()
    add_replay(
        tmp_path / "replay", **{k: draw.choice(STRANGE) for k in draw.sample(["loss", "equal", "worst", "terms"], 2)}
    )
    built(tmp_path)


def hostile_run(folder: Path) -> Path:
    names = {f"train/gradient_norm/{text}": 1.0 for text in HOSTILE}
    names |= {f"train/image_loss/{text}": 1.0 for text in HOSTILE} | {f"time/{SCRIPT}": 0.5, f"val/{SCRIPT}loss": 1.0}
    names |= {f"tokens/{SCRIPT}_visible": 1.0, f"train/epochs/{SCRIPT}": 1.0, f"train/replaced/{SCRIPT}": 1.0}
    lines(folder / "metrics.jsonl", [{**row(step), **names} for step in (1, 20)])
    lines(folder / "events.jsonl", [event(i, i, text, text) for i, text in enumerate(HOSTILE)])
    with (folder / "events.jsonl").open("a") as file:
        file.write(json.dumps(event(9, 9, "failed", SCRIPT)) + "\n")
    (folder / "config.json").write_text(json.dumps({text: {text: text} for text in HOSTILE}))
    (folder / "evals").mkdir()
    (folder / "evals" / "<b>_3.json").write_text(json.dumps({SCRIPT: 1.0}))
    (folder / "evals" / "<b>_3.md").write_text("\n".join(HOSTILE).encode("utf-8", "replace").decode())
    (folder / "evals" / "<b>_2.json").write_text(json.dumps({SCRIPT: 1.0}))
    (folder / "replay").mkdir()
    worst = [{"position": text, "source": text, "index": text, "loss": 1.0, "caption": text} for text in HOSTILE]
    norms = dict.fromkeys(HOSTILE, 1.0) | {SCRIPT * 2: None}
    add_replay(folder / "replay", worst=worst, gradient_norms=norms, from_step=SCRIPT, verdict=SCRIPT)
    return folder


def test_whatever_comes_from_files_is_text(tmp_path):
    text, parsed = built(hostile_run(tmp_path))
    assert "<script" not in text and parsed.text.count(SCRIPT) > 20
    assert "<b>" not in text


def test_a_part_that_fails_leaves_the_others(whole, monkeypatch, caplog):
    def fails(metrics):
        raise RuntimeError(SCRIPT)

    monkeypatch.setattr(measured, "throughput", fails)
    with caplog.at_level(logging.WARNING):
        text = build_run(whole).read_text()
    check(text)
    assert f"{NOT_MADE}: <bdi>RuntimeError: &lt;script&gt;" in section(text, "25-throughput")
    assert "finished at" in section(text, "00-run") and "'Throughput'" in caplog.text


def test_a_browser_shows_it_without_complaint(whole, tmp_path):
    dom, console = load_in_browser(build_run(whole), tmp_path / "profile")
    assert console == [] and dom.count("<section") == 8 and dom.count("<svg") > 12
    hostile_run(tmp_path)
    dom, console = load_in_browser(build_run(tmp_path), tmp_path / "profile")
    assert console == [] and "<script" not in dom


# --- that a run can afford it ------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [400, 1200])
def test_item_15_nothing_is_cut_at_400_or_1200_pixels(whole, tmp_path, width):
    folder = shutil.copytree(whole, tmp_path / "night")
    place = "/data/sets/of/pictures/cc12m/" + "{00000..01242}.tar"
    (folder / "data.json").write_text(
        json.dumps(
            {
                "time": "2026-11-29T10:00:00Z",
                "sources": {
                    "data.train": {
                        "format": "webdataset", "path": place, "modalities": ["image", "text"], "examples": 12_423_374,
                        "files": 1243, "skipped": {"no caption": [17, place]}, "left_out": {"json": [3, place]},
                    }
                },
            }
        )
    )  # fmt: skip
    crowded = CONFIG | {
        "mixture": {"a name of a source that is long": {"path": place}},
        "tensorflow_datasets" * 3: place,
    }
    (folder / "config.json").write_text(json.dumps(crowded))
    long = event(82, 2000, "warning", f"left out of {place}: 17 without a caption, the first of them {place}/000000017")
    lines(folder / "events.jsonl", [*EVENTS, long])
    file = build_run(folder)
    assert cut_off(file, tmp_path / "profile", width) == (width, width, [])


def test_item_15_the_verdict_stands_whole_below_its_table(tmp_path):
    folder = make_run(tmp_path / "night", every=500)
    verdict = f"Verdict: {'; '.join(f'direction {i}, better by 0.123 [0.100, 0.146]' for i in range(20))}."
    Result.of("retrieval", {"n": 1.0}, "| score | n |\n|---|---|\n| cls | 1 |", verdict).save(folder / "evals", 2000)
    part = section(built(folder)[0], "40-evaluations")
    assert f"<p><bdi>{verdict}</bdi></p>" in part and part.index("cls</td>") < part.index(verdict)


def test_item_15_fourteen_lines_are_told_apart_by_few_hues_and_dashes():
    series = Series(np.arange(3), np.arange(3.0))
    names = [f"group {i}" for i in range(14)]
    drawn = charts.chart("gradient norm, by group", "L2", [Line(name, series) for name in names])
    keys = re.findall(r'<span><svg class="chart key".*?style="(.*?)".*?<bdi>(.*?) 2</bdi>', drawn)
    assert [name for _, name in keys] == names
    styles = [style for style, _ in keys]
    assert len(set(styles)) == 14 and len({style.partition(";")[0] for style in styles}) <= 4
    body = drawn.partition("</div>")[2]
    assert all(body.count(f'style="{style}"') == 1 for style in styles), "the lines are drawn as the legend says"


def colours_of(theme: str) -> list[np.ndarray]:
    """The hues of a chart's lines in linear light."""
    style = page._STYLE.partition("@media")[0 if theme == "light" else 2]
    found = dict(re.findall(r"--(c\d): #([0-9a-f]{6})", style))
    values = [np.array([int(found[f"c{i}"][j : j + 2], 16) for j in (0, 2, 4)]) / 255 for i in range(1, 5)]
    return [np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4) for value in values]


# Machado, Oliveira and Fernandes (2009): what is seen without the cones for red, for green, for blue.
CONES = {
    "red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("without", CONES)
def test_item_15_hues_are_told_apart_by_the_colour_blind(theme, without):
    def lab(linear: np.ndarray) -> np.ndarray:
        to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
        xyz = to_xyz @ np.clip(linear, 0, 1) / [0.9505, 1.0, 1.089]
        f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
        return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])

    seen = [lab(CONES[without] @ colour) for colour in colours_of(theme)]
    for a, b in itertools.combinations(seen, 2):
        assert np.linalg.norm(a - b) > 10  # of two colours side by side 2 is seen


def test_item_15_pictures_of_normalised_patches_say_whose_statistics_they_have(whole, tmp_path):
    told = "mean and deviation of the true one"
    assert told not in build_run(whole).read_text()
    folder = shutil.copytree(whole, tmp_path / "night")
    (folder / "config.json").write_text(json.dumps(CONFIG | {"m3ae": {"normalize_patches": True}}))
    text = build_run(folder).read_text(encoding="utf-8")
    assert told in section(text, "30-reconstructions") and told in section(text, "60-replay")


def test_a_long_run_takes_no_time(tmp_path):
    lines(tmp_path / "metrics.jsonl", [row(50 * i, kinds=20) for i in range(1, 6001)])
    lines(tmp_path / "events.jsonl", [event(i % 600, i, "saved", "checkpoint") for i in range(3000)])
    begin = time.process_time()
    file = build_run(tmp_path)
    assert time.process_time() - begin < 4, "2 s on a machine that does nothing else"
    assert file.stat().st_size < 2e6


def test_imports_no_accelerator_library():
    code = "import sys, m3ae_jax.report.run; print({'jax', 'tensorflow', 'matplotlib.pyplot'} & set(sys.modules))"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "set()", done.stderr
