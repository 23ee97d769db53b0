"""Training a tokenizer: the same file each time, whole words where asked for, one line for a mistake."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from m3ae_jax.data import images
from m3ae_jax.data.sources.base import Record
from m3ae_jax.data.sources.index import Tally
from m3ae_jax.data.text import load_tokenizer
from m3ae_jax.data.train_tokenizer import read_captions, train
from m3ae_jax.errors import UserError

CAPTIONS = [f"A {c} {s} of size {i}" for i in range(40) for c in ("red", "blue") for s in ("circle", "square")]


class Numbers:
    """A source whose i-th caption says i, and which remembers how it was read."""

    modalities: tuple[str, ...] = ("text",)
    fingerprint = "0"

    def __init__(self, size: int) -> None:
        self.size = size
        self.reads: list[int] = []

    def __len__(self) -> int:
        return self.size

    def read(self, indices: np.ndarray) -> list[Record]:
        self.reads.append(len(indices))
        return [Record(caption=f" number\x00  {i}\n".encode()) for i in indices]


def run(*args: str) -> subprocess.CompletedProcess[str]:
    """The command as a user gives it."""
    command = [sys.executable, "-m", "m3ae_jax.data.train_tokenizer", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("model_type", ["unigram", "word"])
def test_training_twice_gives_the_same_bytes(tmp_path: Path, model_type: str) -> None:
    for name in ("a.model", "sub/folder/b.model"):
        train(iter(CAPTIONS), str(tmp_path / name), 100, model_type)
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "sub/folder/b.model").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.model", "sub"]


def test_ids_of_padding_and_unknown(tmp_path: Path) -> None:
    size = train(CAPTIONS, str(tmp_path / "a.model"), 30)
    tokenizer = load_tokenizer(str(tmp_path / "a.model"))
    assert tokenizer.vocab_size == size == 30
    assert tokenizer.pieces([0, 1]) == ["<pad>", "<unk>"]
    assert not {"<s>", "</s>"} & set(tokenizer.pieces(range(size)))
    assert tokenizer.encode(["A RED circle"]) == tokenizer.encode(["a red circle"])
    assert 1 in tokenizer.encode(["a red 中"])[0]


def test_word_type_has_whole_words(tmp_path: Path) -> None:
    train(CAPTIONS, str(tmp_path / "a.model"), 1_000, "word")
    tokenizer = load_tokenizer(str(tmp_path / "a.model"))
    ids = tokenizer.encode(["A red circle of size 39", "A green circle"])
    assert [len(row) for row in ids] == [6, 3]
    assert tokenizer.pieces(ids[1]) == [" A", "<unk>", " circle"]


def test_a_size_beyond_the_data_gives_what_there_is(tmp_path: Path) -> None:
    assert train(["a cat"], str(tmp_path / "a.model"), 32_000) < 20
    assert train(["a cat", "", "a dog"], str(tmp_path / "b.model"), 32_000, "word") == 5


def empty_captions() -> Iterator[str]:
    """Captions without text."""
    yield from ["", ""]


@pytest.mark.parametrize(
    ("captions", "output", "vocab_size", "model_type", "says"),
    [
        (
            CAPTIONS,
            "a.model",
            10,
            "unigram",
            "vocab_size=10 is too small: these captions' characters need at least",
        ),
        (CAPTIONS, "a.model", 2, "word", "vocab_size=2 is too small"),
        (CAPTIONS, "a.model", -5, "unigram", "vocab_size=-5 is too small"),
        (CAPTIONS, "a.model", 100, "words", "did you mean 'word'?"),
        (CAPTIONS, "a.bin", 100, "unigram", "must end in .model"),
        (empty_captions(), "a.model", 100, "unigram", "no caption with text"),
        (["\ufffd"], "a.model", 100, "unigram", "no model can be made"),
    ],
)
def test_mistakes_get_one_line(
    tmp_path: Path, captions: list[str], output: str, vocab_size: int, model_type: str, says: str
) -> None:
    with pytest.raises(UserError) as error:
        train(captions, str(tmp_path / output), vocab_size, model_type)
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        train(CAPTIONS, str(tmp_path / "file" / "a.model"), 100)
    (tmp_path / "folder.model").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        train(CAPTIONS, str(tmp_path / "folder.model"), 100)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.model"]


def test_captions_are_read_in_chunks_and_cleaned() -> None:
    source = Numbers(2_500)
    assert list(read_captions(source, 10_000)) == [f"number {i}" for i in range(2_500)]
    assert source.reads == [1_000, 1_000, 500]


def test_too_many_captions_are_thinned_evenly() -> None:
    assert list(read_captions(Numbers(1_000), 5)) == [f"number {i}" for i in (0, 200, 400, 600, 800)]
    assert list(read_captions(Numbers(10), 4)) == [f"number {i}" for i in (0, 2, 5, 7)]


def test_item_1_examples_without_a_caption_are_passed_over_and_counted() -> None:
    class Odd(Numbers):
        def read(self, indices: np.ndarray) -> list[Record]:
            records = [
                Record(image=b""),
                Record(unusable=images.TOO_MANY_BYTES),
                Record(caption=b" "),
                Record(caption=b"a"),
            ]
            return [records[i % 4] for i in indices]

    tally = Tally()
    assert list(read_captions(Odd(10), 100, tally)) == ["", "a", "", "a"]
    assert tally.skipped == {
        images.NO_CAPTION: (3, "example 0"),
        images.TOO_MANY_BYTES: (3, "example 1"),
        images.NO_WORDS: (2, "example 2"),
    }


def test_item_2_the_command_tells_what_was_left_out(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("\n".join(CAPTIONS) + "\n\n")
    output = f"--output={tmp_path / 'a.model'}"
    result = run("--source=text", f"--path={tmp_path / 'lines.txt'}", output, "--vocab_size=30")
    assert result.returncode == 0, result.stderr
    first, second = result.stdout.splitlines()
    assert first == f"{tmp_path / 'a.model'}: 30 ids from {len(CAPTIONS)} captions"
    assert "not read: blank line 1 (e.g. lines.txt:byte " in second
    refused = run("--source=text", f"--path={tmp_path / 'lines.txt'}", output, "--caption_key=text")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert "--caption_key='text': the format text does not read it" in refused.stderr


def test_command_says_a_wrong_source_in_one_line(tmp_path: Path) -> None:
    result = run("--source=webdatset", f"--output={tmp_path / 'a.model'}")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "did you mean 'webdataset'?" in result.stderr


def test_command_on_the_scenes_remakes_the_built_in_model(tmp_path: Path) -> None:
    pytest.importorskip("m3ae_jax.data.sources.scenes")
    result = run("--source=scenes", "--model_type=word", f"--output={tmp_path / 'a.model'}")
    assert result.returncode == 0, result.stderr
    made, built_in = load_tokenizer(str(tmp_path / "a.model")), load_tokenizer("scenes")
    assert made.pieces(range(made.vocab_size)) == built_in.pieces(range(built_in.vocab_size))
