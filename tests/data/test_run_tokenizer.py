"""The tokenizer in a run's folder: found when the original is gone, never taken for another."""

import os
from pathlib import Path

import pytest

from m3ae_jax.data import run_tokenizer
from m3ae_jax.data.text import load_tokenizer, tokenizer_file
from m3ae_jax.errors import UserError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder, beside it its tokenizer's file."""
    (tmp_path / "run").mkdir()
    (tmp_path / "original.model").write_bytes(tokenizer_file("scenes").read_bytes())
    run_tokenizer.keep(str(tmp_path / "original.model"), tmp_path / "run")
    return tmp_path / "run"


def test_item_10_a_run_holds_a_copy_of_its_tokenizer(run: Path) -> None:
    original = run.parent / "original.model"
    assert os.listdir(run) == ["tokenizer.model"]
    assert run_tokenizer.held(run) == run / "tokenizer.model"
    original.unlink()
    run_tokenizer.keep(str(original), run)  # as at the next start
    found = run_tokenizer.of_run(str(original), run, "give it")
    assert found.fingerprint == load_tokenizer("scenes").fingerprint


def test_item_10_another_kind_takes_the_copys_place(run: Path) -> None:
    (run.parent / "vocab.txt").write_text("[UNK]\na\n")
    run_tokenizer.keep(str(run.parent / "vocab.txt"), run)
    assert sorted(os.listdir(run)) == ["tokenizer.model.former", "tokenizer.txt"]
    run_tokenizer.keep("scenes", run)
    assert sorted(os.listdir(run)) == ["tokenizer.model", "tokenizer.model.former", "tokenizer.txt.former"]


def test_item_10_a_tokenizer_that_lies_in_the_runs_folder_is_its_copy(run: Path) -> None:
    for name in ("tokenizer.model", "tokenizer.txt"):
        (run / name).write_text("somebody's own\n")
    run_tokenizer.keep(str(run / "tokenizer.txt"), run)
    assert sorted(os.listdir(run)) == ["tokenizer.model", "tokenizer.txt"]


def test_item_10_by_its_fingerprint_the_copy_counts_where_the_file_has_changed(run: Path) -> None:
    pytest.importorskip("tokenizers", reason="needs tokenizers")
    original, right = run.parent / "vocab.txt", load_tokenizer("scenes").fingerprint
    original.write_text("[UNK]\na\n")
    assert run_tokenizer.of_run(str(original), run, "", right).fingerprint == right
    assert run_tokenizer.of_run(str(original), run, "").vocab_size == 2  # of no fingerprint the file that is named


def test_item_10_a_missing_tokenizer_is_one_line_that_says_where_it_was_looked_for(run: Path, tmp_path: Path) -> None:
    (run / "tokenizer.model").unlink()
    with pytest.raises(UserError) as error:
        run_tokenizer.of_run(str(tmp_path / "gone.model"), run, "give its file: load(..., tokenizer=FILE)")
    said = str(error.value)
    assert f"tokenizer='{tmp_path}/gone.model' cannot be read (No such file or directory)" in said
    assert f"{run} holds no tokenizer.model, tokenizer.txt, tokenizer.json" in said
    assert said.endswith("give its file: load(..., tokenizer=FILE)") and "train" not in said and "\n" not in said


def test_item_12_a_folder_without_a_tokenizer_json_names_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "spm.model").touch()
    with pytest.raises(UserError, match=r"is a folder without a tokenizer\.json; did you mean '.*/spm\.model'\?"):
        load_tokenizer(str(tmp_path))
