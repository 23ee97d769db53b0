"""Rows survive a resume and a cut line; what was lost is cut; a writer of the user gets all and breaks nothing."""

import json
import logging
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import m3ae_jax.metrics.writers as writers
from m3ae_jax import config as config_lib
from m3ae_jax.errors import UserError
from m3ae_jax.metrics.writers import MetricWriter, RunInfo, cut_rows, damaged_lines, read_every_step, read_rows


def config_of(*names):
    config = config_lib.default()
    config.metrics.writers = names
    return config_lib.resolve(config)


def metrics(workdir, *names, step=0, **options):
    """Started."""
    writer = MetricWriter(workdir, config_of(*names), **options)
    writer.start(step)
    return writer


def test_rows_are_read_back_once_a_step_and_nan_is_null(tmp_path):
    writer = metrics(tmp_path, "tensorboard")
    writer.scalars(1, {"train/loss": 2.0})
    writer.scalars(1, {"val/loss": 3.0})
    writer.scalars(2, {"train/loss": float("nan")})
    writer.image(2, "picture", np.zeros((4, 4, 3), np.uint8))
    writer.close()
    again = metrics(tmp_path, "tensorboard", step=2)
    again.scalars(2, {"train/loss": 1.5})
    again.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "train/lo')
    rows = [{"step": 1, "train/loss": 2.0, "val/loss": 3.0}, {"step": 2, "train/loss": 1.5}]
    assert read_rows(tmp_path) == rows
    resumed = MetricWriter(tmp_path, config_of())
    resumed.scalars(4, {"train/loss": 1.0})
    resumed.close()
    assert read_rows(tmp_path) == [*rows, {"step": 4, "train/loss": 1.0}]
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[2])["train/loss"] is None
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_a_process_that_does_not_write_writes_nothing(tmp_path):
    writer = metrics(tmp_path, "tensorboard", enabled=False)
    writer.scalars(1, {"train/loss": 2.0})
    writer.every_step(1, {"loss": [2.0]})
    writer.text(1, "config", "text")
    writer.close()
    assert list(tmp_path.iterdir()) == []
    assert read_rows(tmp_path) == []


# --- item 7: a killed run leaves no step twice -------------------------------------------------------------


def written(workdir, last, step=0):
    """The rows of steps after `step`, three of every_step to a line."""
    writer = metrics(workdir, step=step)
    for one in range(step + 1, last + 1):
        writer.scalars(one, {"train/loss": float(one)})
    for first in range(step + 1, last + 1, 3):
        writer.every_step(first, {"loss": [float(one) for one in range(first, min(first + 3, last + 1))]})
    writer.close()


def steps_of(workdir):
    rows = [row["step"] for row in writers.read_lines(workdir / "metrics.jsonl")]
    lines = writers.read_lines(workdir / "every_step.jsonl")
    return rows, [line["step"] + place for line in lines for place in range(len(line["loss"]))]


@pytest.mark.parametrize("step", range(8))
def test_item_7_rows_of_lost_steps_are_cut_when_the_run_goes_on(tmp_path, step):
    written(tmp_path, 7)
    assert steps_of(tmp_path) == ([*range(1, 8)],) * 2
    metrics(tmp_path, step=step).close()
    assert steps_of(tmp_path) == ([*range(1, step + 1)],) * 2
    written(tmp_path, 9, step)
    assert steps_of(tmp_path) == ([*range(1, 10)],) * 2
    assert read_every_step(tmp_path, 9) == {"loss": 9.0} and read_every_step(tmp_path, 10) is None


@pytest.mark.parametrize(
    "torn", ['{"step": 3, "train/lo', '{"step": 3, "train/loss": 1.0}', "\x00\xff", "[" * 9999, "7"]
)
def test_item_7_a_last_line_that_a_kill_has_cut(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    good = '{"step": 1, "a": NaN}\n{"step": 2}\n{"step": 1, "val/loss": 1.0}\n{"note": "a user\'s"}\n'
    for lost in ("", '{"step": 9, "a": 1}\n'):
        path.write_bytes(good.encode() + lost.encode() + torn.encode("latin1"))
        cut_rows(path, 3)
        assert path.read_text().removesuffix("7\n") == good


def test_item_7_a_fresh_start_cuts_the_rows_of_one_that_failed(tmp_path):
    written(tmp_path, 3)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 0, "val/loss": 1.0}\n')
    metrics(tmp_path).close()
    assert steps_of(tmp_path) == ([], [])


def test_item_7_rows_are_replaced_only_where_there_is_something_to_cut(tmp_path):
    written(tmp_path, 3)
    before = (tmp_path / "metrics.jsonl").stat()
    metrics(tmp_path, step=3).close()
    metrics(tmp_path, step=1, enabled=False).close()
    after = (tmp_path / "metrics.jsonl").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_item_7_an_evaluation_cuts_nothing(tmp_path):
    written(tmp_path, 5)
    writer = MetricWriter(tmp_path, config_of("tensorboard"))
    writer.start(2, evaluation=True)
    writer.scalars(2, {"knn/accuracy": 0.5})
    writer.close()
    assert steps_of(tmp_path)[0] == [1, 2, 3, 4, 5, 2]
    assert (
        read_rows(tmp_path)[1] == {"step": 2, "train/loss": 2.0, "knn/accuracy": 0.5} and len(read_rows(tmp_path)) == 5
    )


def test_item_7_a_cut_that_cannot_be_written_is_told_once_and_made_up_for(tmp_path, monkeypatch, caplog):
    written(tmp_path, 5)

    def full(path):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writers, "replacing", full)
        writer = metrics(tmp_path, step=2)
        for step in (3, 4):
            writer.scalars(step, {"train/loss": -1.0})
    assert [record.message for record in caplog.records if "metrics.jsonl" in record.message] == [
        "metrics.jsonl cannot be written ([Errno 28] No space left on device); training goes on"
    ]
    assert steps_of(tmp_path)[0] == [1, 2, 3, 4, 5, 3, 4]  # nothing is lost
    assert [row["train/loss"] for row in read_rows(tmp_path)] == [1, 2, -1, -1]  # nor misread
    writer.scalars(5, {"train/loss": -1.0})
    assert [row["train/loss"] for row in read_rows(tmp_path)] == [1, 2, -1, -1, -1]
    assert steps_of(tmp_path)[0] == [1, 2, 3, 4, 5]


# --- item 13: writers by import path -----------------------------------------------------------------------

MINE = """
import numpy as np

calls = []
fails = set()


class Mine:
    def __init__(self, run):
        self.told("made", run)

    def told(self, what, *values):
        calls.append((what, *values))
        if what in fails:
            raise RuntimeError(f"{what} is\\nbroken")

    def scalars(self, step, values):
        self.told("scalars", step, values)

    def image(self, step, name, picture):
        self.told("image", step, name, picture.shape, picture.dtype == np.uint8)

    def text(self, step, name, text):
        self.told("text", step, name, text)

    def close(self):
        self.told("close")
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The module of a writer outside the package."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "my_writer.py").write_text(MINE)
    (tmp_path / "code" / "my_mistake.py").write_text("import nowhere_at_all\n")
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    monkeypatch.delitem(sys.modules, "my_writer", raising=False)
    import my_writer

    yield my_writer
    sys.modules.pop("my_writer")


def test_item_13_a_writer_outside_the_package_receives_everything(tmp_path, mine):
    writer = metrics(tmp_path, "my_writer:Mine", "my_writer:Mine", step=4)
    writer.scalars(5, {"train/loss": 2.0})
    writer.every_step(5, {"loss": [2.0]})
    writer.image(5, "reconstructions", np.zeros((4, 6, 3), np.uint8))
    writer.text(5, "reconstructions/captions", "a dog")
    writer.close()
    (_, run), *rest = mine.calls
    assert isinstance(run, RunInfo) and (run.workdir, run.step, run.first, run.evaluation) == (tmp_path, 4, 5, False)
    assert run.config.metrics.writers[0] == "my_writer:Mine"
    assert rest == [
        ("scalars", 5, {"train/loss": 2.0}),
        ("image", 5, "reconstructions", (4, 6, 3), True),
        ("text", 5, "reconstructions/captions", "a dog"),
        ("close",),
    ]
    assert not (tmp_path / "tensorboard").exists()
    assert read_rows(tmp_path) == [{"step": 5, "train/loss": 2.0}]


def test_item_13_a_writer_is_made_by_one_process(tmp_path, mine):
    metrics(tmp_path, "my_writer:Mine", enabled=False).close()
    assert mine.calls == []


@pytest.mark.parametrize("broken", ["made", "scalars", "image", "text", "close"])
def test_item_13_a_writer_that_fails_is_told_once_and_tried_again(tmp_path, mine, caplog, broken):
    mine.fails.add(broken)
    writer = metrics(tmp_path, "my_writer:Mine", "tensorboard")

    def write(step):
        writer.scalars(step, {"train/loss": 2.0})
        writer.image(step, "picture", np.zeros((4, 4, 3), np.uint8))
        writer.text(step, "text", "words")

    write(1)
    mine.fails.clear()
    before = len(mine.calls)
    write(2)
    got = [call[:2] for call in mine.calls[before:] if call[0] != "made"]
    assert got == [("scalars", 2), ("image", 2), ("text", 2)]
    mine.fails.add(broken)
    writer.close()
    told = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert told[0] == f"my_writer:Mine cannot be written ({broken} is broken); training goes on"
    assert told[1:] == ([] if broken == "close" else ["my_writer:Mine can be written again"])
    assert [row["step"] for row in read_rows(tmp_path)] == [1, 2]


def test_item_13_a_writer_that_takes_long_to_fail_does_not_slow_the_run(tmp_path, mine, monkeypatch):
    now = [0.0]

    def hangs(self, step, values):
        mine.calls.append(now[0])
        now[0] += 30
        raise TimeoutError

    monkeypatch.setattr(mine.Mine, "scalars", hangs)
    writer = metrics(tmp_path, "my_writer:Mine", clock=lambda: now[0])
    for step in range(1, 10_001):
        now[0] += 1
        writer.scalars(step, {})
    waited = 30 * (len(mine.calls) - 1)
    assert 60 <= waited <= 0.01 * now[0] + 30
    assert len(read_rows(tmp_path)) == 10_000


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("wandbb", r"metrics.writers='wandbb' is not one of tensorboard, wandb; did you mean 'wandb'\? \(or an import"),
        (
            "nowhere_at_all:Mine",
            "metrics.writers='nowhere_at_all:Mine' cannot be imported: ModuleNotFoundError: No module",
        ),
        ("my_writer:Yours", "metrics.writers='my_writer:Yours' cannot be imported: AttributeError: .* 'Yours'"),
        ("my_mistake:Mine", "metrics.writers='my_mistake:Mine' cannot be imported: .*nowhere_at_all"),
        (":", "metrics.writers=':' cannot be imported"),
    ],
)
@pytest.mark.parametrize("enabled", [True, False])
def test_item_13_a_writer_that_is_none_is_one_line_on_each_process(tmp_path, mine, name, said, enabled):
    with pytest.raises(UserError, match=said) as error:
        metrics(tmp_path, name, enabled=enabled)
    assert "\n" not in str(error.value) and not (tmp_path / "metrics.jsonl").exists()


def test_item_13_a_writer_that_cannot_work_ends_the_start_and_no_later_step(tmp_path, mine, monkeypatch):
    def refuses(self, *arguments):
        raise UserError("pip install it")

    with monkeypatch.context() as patch:
        patch.setattr(mine.Mine, "scalars", refuses)
        metrics(tmp_path, "my_writer:Mine").scalars(1, {})
    monkeypatch.setattr(mine.Mine, "__init__", refuses)
    with pytest.raises(UserError, match="pip install it"):
        metrics(tmp_path, "my_writer:Mine")


def test_item_13_writers_do_not_identify_a_run():
    assert not config_lib.identifies("metrics.writers")
    config = config_lib.default()
    config_lib.apply_overrides(config, [("metrics.writers", "wandb,tensorboard")])
    assert config_lib.resolve(config).metrics.writers == ("wandb", "tensorboard")
    config_lib.apply_overrides(config, [("metrics.writers", "()")])
    assert config_lib.resolve(config).metrics.writers == ()


def test_item_13_the_writer_of_the_docs_works(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    module = types.ModuleType("of_the_docs")
    exec(code, vars(module))
    monkeypatch.setitem(sys.modules, "of_the_docs", module)
    writer = metrics(tmp_path, "of_the_docs:Mine", step=4)
    writer.scalars(5, {"train/loss": 2.0})
    writer.image(5, "picture", np.zeros((4, 6, 3), np.uint8))
    writer.close()
    assert (tmp_path / "mine.txt").read_text() == "from step 5 on; batches of 4096\n5: 2.0\n"
    assert all(f"| `{name}` |" in page for name in writers.WRITERS)


def test_item_1_damaged_lines_are_left_out_and_counted(tmp_path):
    good = [{"step": 1, "train/loss": 2.0}, {"step": 3, "train/loss": 1.0}]
    bad = [b"null", b"[1]", b'{"step": 2, "trai', b"\xff\xfe\x00", b"9" * 5000, b"[" * 100_000]
    strange = [b'{"step": "2"}', b'{"step": null}', b'{"step": true}', b'{"step": -1}', b'{"step": 1e400}', b"{}"]
    lines = [json.dumps(good[0]).encode(), *bad, *strange, json.dumps(good[1]).encode()]
    for name in ("metrics.jsonl", "every_step.jsonl"):
        (tmp_path / name).write_bytes(b"\n".join(lines) + b"\n")
    assert read_rows(tmp_path) == good
    assert read_every_step(tmp_path, 1) is None
    assert damaged_lines(tmp_path / "metrics.jsonl") == len(bad)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": "text", "b": %s, "c": 2}' % ("9" * 400))
    (row,) = read_rows(tmp_path)
    assert row["c"] == 2 and np.isnan(row["a"]) and np.isnan(row["b"])
