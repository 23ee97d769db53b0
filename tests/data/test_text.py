"""Captions to ids: both kinds of tokenizer, and what must hold for captions from anywhere."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import numpy as np
import pytest
import sentencepiece as spm

from m3ae_jax.data.text import Tokenizer, clean_caption, encode_batch, load_tokenizer, read_pieces
from m3ae_jax.data.train_tokenizer import train
from m3ae_jax.errors import UserError

CAPTIONS = [
    "a red dog runs on the green grass",
    "two cats sit in a small red house, by the sea",
    "Straße und Füße im Café",
    "the mask of a cat; a pad, an end, a text",
    "a half ½ of 12 (twelve) birds",
] * 20
VOCABULARY = "[PAD] [UNK] [CLS] [SEP] [MASK] [ ] < > / a dog ##s red cafe run ##ning mask cls sep unk pad s , ."
SPECIAL = "[MASK] a dog [SEP] [CLS] <s> </s> <unk> <pad> [PAD] [UNK]"
SHARED_CAPTIONS = Path(__file__).parents[3] / "shared" / "data" / "corrupt" / "captions"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one file of each kind: words.model, cased.txt, vocab.txt."""
    folder = tmp_path_factory.mktemp("tokenizers")
    train(CAPTIONS, str(folder / "words.model"), vocab_size=200)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY.split()) + "\n", encoding="utf-8")
    (folder / "cased.txt").write_text("\n".join([*VOCABULARY.split(), "Dog", "Café"]) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def sentencepiece(folder: Path) -> Tokenizer:
    return load_tokenizer(str(folder / "words.model"))


@pytest.fixture(scope="module")
def wordpiece(folder: Path) -> Tokenizer:
    pytest.importorskip("tokenizers")
    return load_tokenizer(str(folder / "vocab.txt"))


@pytest.fixture(params=["sentencepiece", "wordpiece"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """Each kind in turn."""
    return request.getfixturevalue(request.param)


def covered(tokenizer: Tokenizer, caption: str) -> list[str]:
    """The text under each token."""
    return [caption[start:end] for start, end in tokenizer.spans(caption)]


# --- cleaning ---


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        (b"", ""),
        (b" \t\r\n ", ""),
        (b"  a\tcat \r\n on  a mat ", "a cat on a mat"),
        (b"a cat\x00 on a \x00\x00mat", "a cat on a mat"),
        (b"a \x1b[31mred\x07 cat\x7f", "a [31mred cat"),
        ("a\u0085cat\u2028on\u00a0a\u0081 mat".encode(), "a cat on a mat"),
        (b"a caf\xe9 \xc3(", "a caf\ufffd \ufffd("),
        ("قطة سوداء".encode(), "قطة سوداء"),
        ("👩🏽\u200d🚒".encode(), "👩🏽\u200d🚒"),
        ("a text \ud800", "a text ?"),
    ],
)
def test_clean_caption(caption: bytes | str, expected: str) -> None:
    assert clean_caption(caption, 100) == expected
    assert clean_caption(expected, 100) == expected


@pytest.mark.parametrize("letter", ["a", "é", "中", "🐈"])
def test_the_cut_counts_characters_and_splits_none(letter: str) -> None:
    assert clean_caption((letter * 20).encode(), 7) == letter * 7
    assert clean_caption(("x" + letter * 20).encode(), 7) == "x" + letter * 6
    assert clean_caption(letter * 20, 7) == letter * 7


def test_a_long_caption_costs_nothing(tokenizer: Tokenizer) -> None:
    captions = [b"a red dog " * 10_000] * 1_000
    start = time.perf_counter()
    ids, length = encode_batch(tokenizer, captions, 16)
    assert time.perf_counter() - start < 2  # whole, these are 30 million tokens
    assert ids.shape == (1_000, 16)
    assert set(length) == {16}


# --- encoding ---


def test_round_trip(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(["A red  dogs", b"a red dogs"])
    assert ids[0] == ids[1]
    assert max(ids[0]) < tokenizer.vocab_size
    assert tokenizer.decode(ids[0]) == "a red dogs"
    assert tokenizer.decode(np.asarray(ids[0], np.int32)) == "a red dogs"


def test_pieces(sentencepiece: Tokenizer, wordpiece: Tokenizer) -> None:
    ids = sentencepiece.encode(["a red dog"])[0]
    assert "".join(sentencepiece.pieces(np.asarray(ids, np.int32))) == " a red dog"
    assert wordpiece.pieces(wordpiece.encode(["red dogs"])[0]) == ["red", "dog", "##s"]


def test_pieces_read_alike_of_all_tokenizers(sentencepiece: Tokenizer, wordpiece: Tokenizer) -> None:
    assert read_pieces(wordpiece, wordpiece.encode(["red dogs"])[0]) == [" red", " dog", "s"]
    ids = sentencepiece.encode(["red dogs"])[0]
    assert read_pieces(sentencepiece, ids) == sentencepiece.pieces(ids)


def test_batch_is_padded_and_cut_from_the_end(tokenizer: Tokenizer) -> None:
    captions = np.array([b"a red dog", b"", b"a a a a a a"], dtype=object)
    ids, length = encode_batch(tokenizer, captions, 4)
    assert ids.shape == (3, 4)
    assert ids.dtype == length.dtype == np.int32
    whole = tokenizer.encode(["a red dog", "a a a a a a"])
    assert ids[0, : length[0]].tolist() == whole[0][:4]
    assert ids[2].tolist() == whole[1][:4]
    assert length[1] == 0
    assert not ids[1].any()
    assert not ids[0, length[0] :].any()


def test_special_tokens_in_a_caption_are_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode([SPECIAL])[0]
    special = {"<pad>", "[PAD]", "[CLS]", "[SEP]", "[MASK]"}
    assert not special & set(tokenizer.pieces(ids))
    # Each takes several tokens, and "mask" in brackets is what the word is anywhere else.
    assert len(ids) > len(SPECIAL.split())
    assert tokenizer.encode(["[MASK] a dog"]) == tokenizer.encode(["[mask] a dog"])
    assert "".join(covered(tokenizer, SPECIAL)) == SPECIAL.replace(" ", "")


def test_control_pieces_of_a_foreign_model_are_never_read_from_text(tmp_path: Path) -> None:
    with (tmp_path / "foreign.model").open("wb") as file:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(CAPTIONS),
            model_writer=file,
            vocab_size=200,
            hard_vocab_limit=False,
            control_symbols=["[MASK]", "[CLS]"],
            minloglevel=2,
        )
    tokenizer = load_tokenizer(str(tmp_path / "foreign.model"))
    control = {"<s>", "</s>", "[MASK]", "[CLS]"}
    assert control <= set(tokenizer.pieces(range(tokenizer.vocab_size)))
    assert not control & set(tokenizer.pieces(tokenizer.encode([SPECIAL])[0]))


@pytest.mark.parametrize("caption", ["", "👩🏽\u200d🚒", "🐈 🐈", "قطة"])
def test_nothing_known_is_empty(tokenizer: Tokenizer, caption: str) -> None:
    assert tokenizer.encode([caption, caption.encode()]) == [[], []]
    assert tokenizer.spans(caption) == []
    assert encode_batch(tokenizer, [caption.encode()], 4)[1].tolist() == [0]


def test_an_unknown_word_among_known_ones_stays(tokenizer: Tokenizer) -> None:
    assert covered(tokenizer, "red 🐈 dog")[-1] in ("dog", "g", "og")
    assert "🐈" in covered(tokenizer, "red 🐈 dog")


@pytest.mark.parametrize("caption", ["A red dogs", "Füße, red Café dogs", "red 🐈 dog 中 a"])
def test_spans_cover_the_caption_in_order(tokenizer: Tokenizer, caption: str) -> None:
    spans = tokenizer.spans(caption)
    assert len(spans) == len(tokenizer.encode([caption])[0])
    assert all(0 <= start <= end <= len(caption) for start, end in spans)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
    assert "".join(covered(tokenizer, caption)) == caption.replace(" ", "")


def test_spans_are_characters_of_the_text_as_given(sentencepiece: Tokenizer, wordpiece: Tokenizer) -> None:
    assert covered(wordpiece, "Füße Café dogs") == ["Füße", "Café", "dog", "s"]
    assert covered(wordpiece, "cafe\u0301 a dog") == ["cafe", "a", "dog"]
    assert "".join(covered(sentencepiece, "cafe\u0301 a")) == "cafe\u0301a"
    caption = "Ｆüße ½ dog"
    assert covered(sentencepiece, caption)[-1].endswith("g")
    assert "½" in covered(sentencepiece, caption)


def test_encoding_in_threads_gives_the_same(tokenizer: Tokenizer) -> None:
    from concurrent.futures import ThreadPoolExecutor

    captions = [caption.encode() for caption in CAPTIONS]
    expected = encode_batch(tokenizer, captions, 12)[0]
    with ThreadPoolExecutor(4) as pool:
        for ids, _ in pool.map(lambda _: encode_batch(tokenizer, captions, 12), range(8)):
            np.testing.assert_array_equal(ids, expected)


def test_cased_vocabulary_keeps_case(folder: Path, wordpiece: Tokenizer) -> None:
    cased = load_tokenizer(str(folder / "cased.txt"))
    assert cased.pieces(cased.encode(["Dog dog Café"])[0]) == ["Dog", "dog", "Café"]
    assert wordpiece.pieces(wordpiece.encode(["Dog dog Café"])[0]) == ["dog", "dog", "cafe"]


# --- loading ---


def test_fingerprint_is_the_content(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    name = "vocab.txt" if tokenizer.vocab_size == len(VOCABULARY.split()) else "words.model"
    copy = tmp_path / f"copy_{name}"
    copy.write_bytes((folder / name).read_bytes())
    assert load_tokenizer(str(copy)).fingerprint == tokenizer.fingerprint
    train(CAPTIONS[:3], str(tmp_path / "other.model"), vocab_size=200)
    assert load_tokenizer(str(tmp_path / "other.model")).fingerprint != tokenizer.fingerprint


def test_windows_line_ends_and_none_at_the_end(folder: Path, wordpiece: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "crlf.txt").write_bytes("\r\n".join(VOCABULARY.split()).encode())
    crlf = load_tokenizer(str(tmp_path / "crlf.txt"))
    assert crlf.vocab_size == wordpiece.vocab_size
    assert crlf.encode(["red dogs."]) == wordpiece.encode(["red dogs."])


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("scene", None, "neither 'scenes' nor"),
        ("a.json", b"{}", "neither 'scenes' nor"),
        ("missing.model", None, "No such file"),
        ("missing.txt", None, "No such file"),
        ("junk.model", b"not a model" * 100, "not a SentencePiece model"),
        ("empty.model", b"", "not a SentencePiece model"),
        ("captions.txt", b"a red dog\na cat\n", "no line reads [UNK]"),
    ],
)
def test_a_wrong_file_gets_one_line(tmp_path: Path, name: str, content: bytes | None, says: str) -> None:
    if name == "captions.txt":
        pytest.importorskip("tokenizers")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        load_tokenizer(str(tmp_path / name))
    assert says in str(error.value)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_wordpiece_without_its_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(UserError, match="pip install tokenizers"):
        load_tokenizer(str(folder / "vocab.txt"))


# --- the built-in model ---


def test_every_word_of_the_scenes_is_one_piece() -> None:
    scenes = pytest.importorskip("m3ae_jax.data.sources.scenes")
    tokenizer = load_tokenizer("scenes")
    words = list(scenes.vocabulary())
    assert [tokenizer.pieces(row) for row in tokenizer.encode(words)] == [[f" {word}"] for word in words]
    assert len({row[0] for row in tokenizer.encode(words)}) == len(words)
    assert tokenizer.pieces(tokenizer.encode([f"{words[0]} zyzzyva"])[0]) == [f" {words[0]}", "<unk>"]


def test_the_built_in_model_is_small() -> None:
    from m3ae_jax.data import text

    assert Path(text.__file__).with_name("scenes.model").stat().st_size < 20_000


# --- the collection of bad captions, where it is at hand ---


@pytest.mark.skipif(not SHARED_CAPTIONS.is_dir(), reason="the shared bad captions are not beside this checkout")
def test_shared_bad_captions(tokenizer: Tokenizer) -> None:
    files = sorted(SHARED_CAPTIONS.glob("*.txt"))
    ids, length = encode_batch(tokenizer, [file.read_bytes() for file in files], 32)
    result = dict(zip([file.stem[:2] for file in files], length.tolist(), strict=True))
    assert ids.shape == (len(files), 32)
    assert result["01"] == result["07"] == 0
    assert result["04"] == 32
    assert min(result["03"], result["06"], result["15"]) > 0
