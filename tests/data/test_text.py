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


def hugging_face(kind: str) -> str:
    """A `tokenizer.json` that `tokenizers` trained, with special tokens, cutting and padding, as such files have."""
    made = pytest.importorskip("tokenizers")
    models, trainers = made.models, made.trainers
    options = {
        "special_tokens": ["<pad>", "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "</s>"],
        "show_progress": False,
    }
    if kind == "bytes":
        result, trainer = (
            made.Tokenizer(models.BPE(dropout=0.5)),
            trainers.BpeTrainer(vocab_size=400, initial_alphabet=made.pre_tokenizers.ByteLevel.alphabet(), **options),
        )
        result.pre_tokenizer = made.pre_tokenizers.ByteLevel(add_prefix_space=False)
        result.decoder, result.normalizer = made.decoders.ByteLevel(), made.normalizers.Lowercase()
    elif kind == "wordpiece":
        result = made.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        trainer = trainers.WordPieceTrainer(vocab_size=120, **options)
        result.normalizer, result.decoder = made.normalizers.BertNormalizer(), made.decoders.WordPiece()
        result.pre_tokenizer = made.pre_tokenizers.BertPreTokenizer()
    else:
        result = made.Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(vocab_size=120, unk_token="[UNK]", **options)
        result.normalizer = made.normalizers.Lowercase()
        result.pre_tokenizer, result.decoder = made.pre_tokenizers.Metaspace(), made.decoders.Metaspace()
    result.train_from_iterator([*CAPTIONS, *["red dogs, red dog [mask]"] * 50], trainer)
    result.enable_truncation(3)
    result.enable_padding(length=50)
    cls = result.token_to_id("[CLS]")
    result.post_processor = made.processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", cls)])
    return result.to_str(pretty=True)


@pytest.fixture(scope="module", params=["bytes", "wordpiece", "unigram"])
def json_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `tokenizer.json` of each model."""
    file = tmp_path_factory.mktemp(request.param) / "tokenizer.json"
    file.write_text(hugging_face(request.param), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def hf_wordpiece(folder: Path) -> Tokenizer:
    (folder / "words.json").write_text(hugging_face("wordpiece"), encoding="utf-8")
    return load_tokenizer(str(folder / "words.json"))


@pytest.fixture(params=["sentencepiece", "wordpiece", "hf_wordpiece"])
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


# --- tokenizer.json ---


def test_item_10_a_tokenizer_json_is_read(json_file: Path) -> None:
    tokenizer = load_tokenizer(str(json_file))
    assert load_tokenizer(str(json_file.parent)).fingerprint == tokenizer.fingerprint
    rows = tokenizer.encode(["a red dogs", b"A red dogs", "two cats sit in a small red house, by the sea"])
    assert rows[0] == rows[1] and len(rows[0]) < len(rows[2]) > 3  # neither cut nor padded, and no [CLS]
    assert max(map(max, rows)) < tokenizer.vocab_size
    assert tokenizer.decode(np.asarray(rows[0], np.int32)) == "a red dogs"
    assert "".join(read_pieces(tokenizer, rows[0])).strip() == "a red dogs"
    assert tokenizer.encode(["a red dog"] * 50) == [tokenizer.encode(["a red dog"])[0]] * 50  # no dropout


def test_item_10_special_tokens_of_a_tokenizer_json_are_text(json_file: Path) -> None:
    tokenizer = load_tokenizer(str(json_file))
    ids = tokenizer.encode([SPECIAL])[0]
    special = {"<pad>", "[PAD]", "[CLS]", "[SEP]", "[MASK]", "</s>"}
    assert special <= set(tokenizer.pieces(range(tokenizer.vocab_size)))
    assert not special & set(tokenizer.pieces(ids))
    assert tokenizer.encode(["[MASK] a dog"]) == tokenizer.encode(["[mask] a dog"])
    assert "".join(covered(tokenizer, SPECIAL)) == SPECIAL.replace(" ", "")


@pytest.mark.parametrize("caption", ["A red dogs", "Füße, red Café dogs", "red 🐈 dog 中 a", "½ cafe\u0301"])
def test_spans_of_a_tokenizer_json_cover_the_caption_in_order(json_file: Path, caption: str) -> None:
    tokenizer = load_tokenizer(str(json_file))
    spans = tokenizer.spans(caption)
    assert len(spans) == len(tokenizer.encode([caption])[0])
    assert all(0 <= start <= end <= len(caption) for start, end in spans)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
    assert "".join(covered(tokenizer, caption)).replace("\u0301", "") == caption.replace(" ", "").replace("\u0301", "")


def test_pieces_of_bytes_are_readable(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(hugging_face("bytes"), encoding="utf-8")
    tokenizer = load_tokenizer(str(tmp_path / "a.json"))
    assert tokenizer.pieces(tokenizer.encode(["a red füße 🐈"])[0])[-5:] == [" ", r"\xf0", r"\x9f", r"\x90", r"\x88"]
    assert " füße" in tokenizer.pieces(tokenizer.encode(["a red füße"])[0])
    assert tokenizer.decode(tokenizer.encode(["a red füße 🐈"])[0]) == "a red füße 🐈"


def test_pieces_of_a_vocabulary_that_marks_the_ends_of_words(tmp_path: Path) -> None:
    """As CLIP's."""
    made = pytest.importorskip("tokenizers")
    clip = made.Tokenizer(made.models.BPE(end_of_word_suffix="</w>", unk_token="<|end|>"))
    clip.pre_tokenizer = made.pre_tokenizers.Whitespace()
    trainer = made.trainers.BpeTrainer(
        vocab_size=300, end_of_word_suffix="</w>", special_tokens=["<|end|>"], show_progress=False
    )
    clip.train_from_iterator([*CAPTIONS, "s"], trainer)
    clip.save(str(tmp_path / "clip.json"))
    tokenizer = load_tokenizer(str(tmp_path / "clip.json"))
    ids = tokenizer.encode(["a red dogrun"])[0]
    assert "".join(tokenizer.pieces(ids)) == " a red dogrun" and len(ids) > 3
    assert tokenizer.pieces([0]) == ["<|end|>"]
    assert tokenizer.encode(["🐈 🐈"]) == [[]]


def test_a_folder_without_a_tokenizer_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is a folder without a tokenizer\.json; train one"):
        load_tokenizer(str(tmp_path))


# --- loading ---


def test_fingerprint_is_the_content(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    names = {
        "SentencePieceTokenizer": "words.model",
        "WordPieceTokenizer": "vocab.txt",
        "HuggingFaceTokenizer": "words.json",
    }
    name = names[type(tokenizer).__name__]
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
        ("a.bin", b"{}", "neither 'scenes' nor"),
        ("a.json", b"{}", "is no tokenizer.json of Hugging Face's tokenizers (Model missing"),
        ("b.json", b"\xff", "is no tokenizer.json"),
        ("missing.json", None, "No such file"),
        ("missing.model", None, "No such file"),
        ("missing.txt", None, "No such file"),
        ("junk.model", b"not a model" * 100, "not a SentencePiece model"),
        ("empty.model", b"", "not a SentencePiece model"),
        ("captions.txt", b"a red dog\na cat\n", "no line reads [UNK]"),
    ],
)
def test_a_wrong_file_gets_one_line(tmp_path: Path, name: str, content: bytes | None, says: str) -> None:
    if name.endswith((".txt", ".json")):
        pytest.importorskip("tokenizers")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        load_tokenizer(str(tmp_path / name))
    assert says in str(error.value)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["vocab.txt", "a.json"])
def test_without_their_package(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (folder / "a.json").write_text("{}")
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(UserError, match="pip install tokenizers"):
        load_tokenizer(str(folder / name))


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


def test_item_10_of_a_runs_folder_its_tokenizer_is_proposed(tmp_path):
    for name in ("config.json", "log.txt", "tokenizer.model"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"did you mean '.*tokenizer\.model'\?"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(UserError, match="; train one with"):
        load_tokenizer(str(tmp_path))
