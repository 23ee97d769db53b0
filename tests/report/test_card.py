"""The model card: all that a run's folder tells, and nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest

from m3ae_jax import config as config_lib
from m3ae_jax.checkpoint import origin
from m3ae_jax.errors import UserError
from m3ae_jax.evals.base import Data, Result
from m3ae_jax.report import card

TABLE = "| features | k=1 |\n|---|---|\n| trained, image, cls | 0.800 |"
SOURCE = {"modalities": ["image", "text"], "fingerprint": "f" * 16, "classes": 0, "counted": True, "files": 3}


def lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished run."""
    config = config_lib.default()
    config.batch_size, config.duration, config.data.tokenizer = 64, "100 steps", "/gone/words.model"
    config.data.train.update(source="webdataset", path="/data/a|b")
    config.eval.test.update(source="class_folders", path="/data/c")
    (tmp_path / "config.json").write_text(config_lib.to_json(config))
    (tmp_path / "tokenizer.model").write_bytes(b"words")
    left = {"no caption": [7, "0.tar:1"]}
    train = {**SOURCE, "format": "webdataset", "path": "/data/a|b", "examples": 1234, "left_out": left, "not_read": {}}
    told = {"time": "2026-11-29", "versions": {"m3ae_jax": "0.1.0", "jax": "0.9"}, "sources": {"data.train": train}}
    (tmp_path / "data.json").write_text(json.dumps(told))
    kinds = [(0, "started"), (50, "preempted"), (50, "resumed"), (100, "finished")]
    stamp = "2026-11-29T10:00:00Z"
    lines(tmp_path / "events.jsonl", [{"time": stamp, "step": n, "kind": kind, "text": ""} for n, kind in kinds])
    rows = [{"step": 0, "val/loss": 2.0, "prior/loss": 1.9}, {"step": 100, "val/loss": 0.5}]
    lines(tmp_path / "metrics.jsonl", [*rows, {"step": 100, "train/replaced/damaged_picture": 3.0}])
    about = {"source": "class_folders", "path": "/data/other", "split": "val", "examples": 10}
    Result.of("knn", {"accuracy": 0.8}, TABLE, "Verdict: none.").save(tmp_path / "evals", 50, Data())
    Result.of("knn", {"accuracy": 0.8}, TABLE, "Verdict: none.").save(
        tmp_path / "evals", 100, Data("other-abcdef", {"test": about})
    )
    return tmp_path


def test_item_10_the_card_tells_what_the_folder_holds(folder: Path) -> None:
    text = card.write(folder).read_text()
    for said in (
        "A model of image and text, trained by the objective `m3ae`.",
        "- 100 steps; finished at 2026-11-29 10:00 UTC",
        "- 6,400 examples seen, 64 a step",
        "- starts: 2",
        "| `data.train` | webdataset | `/data/a|b` | image+text | 1,234 | no caption 7 |",
        "Replaced by another example while training: damaged picture 3.",
        "- `data.train.path='/data/a|b'`",
        "| loss | 0.5 | 100 | 1.9 |",
        f"`python -m m3ae_jax.main --mode=eval --workdir={folder} --config.evals=knn "
        "--config.eval.test.path=/data/other`",
        "- test: class_folders, /data/other, val, of 10 examples",
        TABLE,
        "a copy of `/gone/words.model`",
        "m3ae_jax 0.1.0, jax 0.9",
    ):
        assert said in text, said
    assert "Weights that it began with" not in text


@pytest.mark.parametrize(
    ("license", "said"), [("CC BY-NC 4.0", "licence: CC BY-NC 4.0"), ("", "licence: unknown: see the source")]
)
def test_item_10_the_licence_of_converted_weights_is_that_which_was_told(folder: Path, license: str, said: str) -> None:
    started = {"run": "runs/mae", "step": 0}
    origin.save(folder, [origin.converted("mae.pth", "mae", license), started])
    text = card.write(folder).read_text()
    assert f"- `mae.pth`, of format mae, {said}\n- step 0 of `runs/mae`" in text
    assert origin.read(folder) == [{"file": "mae.pth", "format": "mae", "license": license}, started]
    origin.save(folder, [])  # of a fresh start that begins with none
    assert "Weights that it began with" not in card.write(folder).read_text()


def test_item_10_a_card_of_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run"):
        card.write(tmp_path)
    (tmp_path / "config.json").write_text('{"objective": "mine:Objective", "mine": {"a": 1}, "strange": 3}')
    assert "All of it is in `config.json`" in card.write(tmp_path).read_text()


def test_item_10_a_strange_file_costs_its_part_alone(folder: Path) -> None:
    (folder / "data.json").write_text('{"sources": {"data.train": {"path": 3}}, "versions": {"jax": "0.9"}}')
    text = card.write(folder).read_text()
    assert "A part could not be made: " in text and "| loss | 0.5 | 100 | 1.9 |" in text and "jax 0.9" in text


def test_item_10_the_cards_commands_allow_code_that_the_config_names(folder: Path) -> None:
    config = config_lib.load(str(folder / "config.json"))
    config.metrics.writers = ("my_writer:Mine",)
    (folder / "config.json").write_text(config_lib.to_json(config))
    commands = [line for line in card.write(folder).read_text().splitlines() if "python -m m3ae_jax.main" in line]
    assert len(commands) >= 3 and all("--config.metrics.writers=my_writer:Mine" in line for line in commands)


def test_item_10_a_card_is_due_when_all_steps_are_done(folder: Path) -> None:
    assert card.is_done(folder)
    with (folder / "events.jsonl").open("a") as events:
        events.write('{"kind": "warning", "text": "late"}\n')
        assert card.is_done(folder)
        events.write('{"kind": "resumed", "text": ""}\n')
        events.flush()
        assert not card.is_done(folder)
