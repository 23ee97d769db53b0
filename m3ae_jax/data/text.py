"""Captions to token ids and back.

SentencePiece models run through the `sentencepiece` package's batch encoder: C++ with the interpreter lock
released, called once per batch from a `tf.numpy_function`. It is a required package already; tensorflow-text
would do the same in the graph, but is one more package, pinned to tensorflow's version. BERT's WordPiece
vocabularies and the `tokenizer.json` of Hugging Face run through the `tokenizers` package (a batch encoder in
Rust), the optional extra `m3ae_jax[wordpiece]`, imported only when such a file is loaded.

What holds for all:

* No special tokens are added: no `[CLS]`, `[SEP]`, bos or eos, as in the M3AE reference.
* Special tokens written in a caption (`[MASK]`, `</s>`) are ordinary text and never become special ids. (A
  SentencePiece model that lists such a string among its *user-defined* pieces has declared it ordinary text.)
* A caption of nothing but unknown tokens (emoji under an English vocabulary) says nothing: it is empty.
* Padding is id 0 beyond `length`; only `length` tells padding from a token, for in a foreign model id 0 may
  be a real token.

Legend: `B` batch, `T` text tokens.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import sentencepiece as spm

from m3ae_jax.errors import UserError
from m3ae_jax.paths import local

# Characters left before tokenizing, for each token of the budget: a piece has at most 16 characters in models that
# train_tokenizer makes, so twice that does not change the first `max_tokens` tokens.
CHARS_PER_TOKEN = 32

_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f]")  # Unicode's Cc without its blanks
_SPACE = "\u2581"  # SentencePiece's mark for a blank before a piece
_CONTINUES = "##"  # WordPiece's mark of a piece that goes on with a word
_NEVER = "\0"  # no clean caption has it
_HOW_TO_TRAIN = (
    "train one with `python -m m3ae_jax.data.train_tokenizer --source=webdataset --path=DIR --output=X.model`"
)


class Tokenizer(Protocol):
    """Text to ids and back.

    Attributes:
        vocab_size: number of ids.
        fingerprint: a short hex string, the hash of the model file's bytes.
    """

    vocab_size: int
    fingerprint: str

    def encode(self, captions: Sequence[bytes | str]) -> list[list[int]]:
        """Ids of each caption, `[]` for one without a known token.

        Args:
            captions: UTF-8 bytes or text, each as `clean_caption` returns it.
        """

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of `[n]` ids, as near to the caption as the vocabulary allows."""

    def pieces(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """The piece of each of `[n]` ids, for people to read: with its leading blank or WordPiece's `##`.

        Of a byte that is no whole character: its code, as `\\xf0`.
        """

    def spans(self, caption: str) -> list[tuple[int, int]]:
        """Where each token of `encode([caption])[0]` stands in the caption.

        Args:
            caption: text as `clean_caption` returns it.

        Returns:
            A (start, end) in characters per token, blanks left out: `caption[start:end]` is the token's text
            (less a combining accent that an uncased vocabulary drops).
            Empty (start == end) for a token that stands for a blank alone, or whose character a neighbour has
            already ("½" normalises to three).
        """


def clean_caption(caption: bytes | str, max_chars: int) -> str:
    """Makes a caption from anywhere safe to tokenize.

    Invalid UTF-8 becomes U+FFFD, control characters vanish (tabs and line ends count as blanks), runs of
    blanks become one, and blanks at the ends go. The cut comes first, so that a caption of 100,000 characters
    costs no more than one of `max_chars`. Cleaning a clean caption changes nothing.

    Args:
        caption: UTF-8 bytes, or text.
        max_chars: characters looked at, counted from the start; nothing beyond can appear in the result.
    """
    if isinstance(caption, str):
        # Through bytes, because a lone surrogate in a text would be refused by the encoders.
        caption = caption[:max_chars].encode("utf-8", "replace")
    text = caption[: 4 * max_chars].decode("utf-8", "replace")[:max_chars]
    if not text.isprintable():
        text = _CONTROL.sub("", text)
    return " ".join(text.split())


def encode_batch(
    tokenizer: Tokenizer, captions: np.ndarray | Sequence[bytes], max_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Cleans and tokenizes a batch, keeping the first `max_tokens` tokens of each caption.

    Args:
        tokenizer: what `load_tokenizer` returned.
        captions: `[B]` UTF-8 bytes, as stored.
        max_tokens: `T`.

    Returns:
        ids: `[B, T] int32`, zero beyond `length`.
        length: `[B] int32`, 0 for an empty caption.
    """
    texts = [clean_caption(caption, CHARS_PER_TOKEN * max_tokens) for caption in captions]
    ids = np.zeros((len(texts), max_tokens), np.int32)
    length = np.zeros(len(texts), np.int32)
    for row, tokens in enumerate(tokenizer.encode(texts)):
        length[row] = min(len(tokens), max_tokens)
        ids[row, : length[row]] = tokens[:max_tokens]
    return ids, length


class SentencePieceTokenizer:
    """A `Tokenizer` on a SentencePiece model of any type.

    Attributes:
        vocab_size: number of ids.
        fingerprint: hash of the model's bytes.
    """

    def __init__(self, model: bytes, name: str) -> None:
        """Loads a model.

        Args:
            model: the model file's bytes.
            name: what to call it in an error.

        Raises:
            UserError: `model` is not a SentencePiece model.
        """
        self._model = spm.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise UserError(f"tokenizer={name!r} is not a SentencePiece model") from error
        self.vocab_size: int = self._model.vocab_size()
        self.fingerprint = _fingerprint(model)
        # The blank before an unknown word may be a token of its own, and is as void as the word.
        self._void = {self._model.unk_id(), self._model.piece_to_id(_SPACE)}

    def encode(self, captions: Sequence[bytes | str]) -> list[list[int]]:
        """See `Tokenizer.encode`."""
        # One thread: the caller has as many of these calls under way as the pipeline has workers, and the
        # default would start one thread per core of the host in each of them.
        rows = self._model.encode(_texts(captions), return_type=int, num_threads=1)
        return [[] if self._void.issuperset(row) else row for row in rows]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """See `Tokenizer.decode`."""
        return self._model.decode([int(i) for i in ids]).strip()

    def pieces(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """See `Tokenizer.pieces`."""
        return [self._model.id_to_piece(int(i)).replace(_SPACE, " ") for i in ids]

    def spans(self, caption: str) -> list[tuple[int, int]]:
        """See `Tokenizer.spans`."""
        # Not return_type="proto": its offsets count UTF-8 bytes, these count characters.
        encoding = self._model.encode(caption, return_type="offset_mapping")
        if self._void.issuperset(encoding["ids"]):
            return []
        return [_without_blanks(caption, start, end) for start, end in encoding["offsets"]]


class WordPieceTokenizer:
    """A `Tokenizer` on a BERT vocabulary, with BERT's own normalisation and splitting.

    Attributes:
        vocab_size: number of ids.
        fingerprint: hash of the file's bytes.
    """

    has_word_pieces = True

    def __init__(self, vocabulary: bytes, name: str) -> None:
        """Loads a vocabulary.

        Args:
            vocabulary: the file's bytes: UTF-8, one token a line, the line's number its id.
            name: what to call it in an error.

        Raises:
            UserError: it has no `[UNK]`, is not UTF-8, or the package `tokenizers` is missing.
        """
        tokenizers = _import_tokenizers(f"tokenizer={name!r} is a WordPiece vocabulary")
        lines = vocabulary.decode("utf-8", "replace").removesuffix("\n").split("\n")
        self._tokens = [line.removesuffix("\r") for line in lines]
        ids = {token: i for i, token in enumerate(self._tokens)}
        if "[UNK]" not in ids:
            raise UserError(f"tokenizer={name!r} is not a WordPiece vocabulary: no line reads [UNK]")
        self.vocab_size = len(self._tokens)
        self.fingerprint = _fingerprint(vocabulary)
        self._unknown = {ids["[UNK]"]}
        # Without added tokens and without a post-processor nothing in a caption can become a special id.
        self._model = tokenizers.Tokenizer(tokenizers.models.WordPiece(ids, unk_token="[UNK]"))
        uncased = not any(re.search("^[^[]*[A-Z]", token) for token in self._tokens)
        self._model.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=uncased)
        self._model.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
        self._model.decoder = tokenizers.decoders.WordPiece()

    def encode(self, captions: Sequence[bytes | str]) -> list[list[int]]:
        """See `Tokenizer.encode`."""
        rows = [row.ids for row in self._model.encode_batch_fast(_texts(captions))]
        return [[] if self._unknown.issuperset(row) else row for row in rows]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """See `Tokenizer.decode`."""
        return self._model.decode([int(i) for i in ids])

    def pieces(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """See `Tokenizer.pieces`."""
        return [self._tokens[i] for i in ids]

    def spans(self, caption: str) -> list[tuple[int, int]]:
        """See `Tokenizer.spans`."""
        encoding = self._model.encode(caption)
        return [] if self._unknown.issuperset(encoding.ids) else list(encoding.offsets)


class HuggingFaceTokenizer:
    """A `Tokenizer` on a `tokenizer.json` of Hugging Face, of any model; what it says of cutting and padding is off.

    Attributes:
        vocab_size: number of ids.
        fingerprint: hash of the file's bytes.
        has_word_pieces: whether its pieces say where they go on with a word, not where they begin one.
    """

    def __init__(self, description: bytes, name: str) -> None:
        """Loads a tokenizer.

        Args:
            description: the file's bytes.
            name: what to call it in an error.

        Raises:
            UserError: it is none, or the package `tokenizers` is missing.
        """
        tokenizers = _import_tokenizers(f"tokenizer={name!r} is one of Hugging Face")
        try:
            self._whole = tokenizers.Tokenizer.from_str(description.decode("utf-8"))
            spec = json.loads(self._whole.to_str())
            self._special = {token["content"] for token in spec["added_tokens"] if token["special"]}
            self._model = tokenizers.Tokenizer.from_str(json.dumps(_without_special(spec, self._special)))
        except Exception as error:  # the package raises no kind of its own
            said = " ".join(str(error).split())
            raise UserError(f"tokenizer={name!r} is no tokenizer.json of Hugging Face's tokenizers ({said})") from error
        self._model.encode_special_tokens = True
        ids = self._whole.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(ids.values(), default=-1) + 1
        self.fingerprint = _fingerprint(description)
        model = spec["model"]
        self._prefix, self._suffix = model.get("continuing_subword_prefix"), model.get("end_of_word_suffix") or ""
        self.has_word_pieces = bool(self._prefix) or model["type"] == "WordLevel"
        self._bytes = _bytes_of_letters() if '"ByteLevel"' in json.dumps(spec["decoder"]) else {}
        unknown = model["vocab"][model["unk_id"]][0] if model.get("unk_id") is not None else model.get("unk_token")
        self._void = {ids[piece] for piece in (unknown, _SPACE) if piece in ids}

    def encode(self, captions: Sequence[bytes | str]) -> list[list[int]]:
        """See `Tokenizer.encode`."""
        rows = [row.ids for row in self._model.encode_batch_fast(_texts(captions), add_special_tokens=False)]
        return [[] if self._void.issuperset(row) else row for row in rows]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """See `Tokenizer.decode`."""
        text: str = self._whole.decode([int(i) for i in ids], skip_special_tokens=False)
        return (text.replace(self._suffix, " ") if self._suffix else text).strip()

    def pieces(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """See `Tokenizer.pieces`."""
        tokens = [self._whole.id_to_token(int(i)) or "" for i in ids]
        if self._suffix:  # marks the ends of words: the next begins one
            begins = [i == 0 or tokens[i - 1].endswith(self._suffix) for i in range(len(tokens))]
            return [self._readable(token, " " * begin) for token, begin in zip(tokens, begins, strict=True)]
        return [self._readable(token) for token in tokens]

    def _readable(self, token: str, before: str = "") -> str:
        if token in self._special:
            return token
        if self.has_word_pieces:
            goes_on = self._prefix and token.startswith(self._prefix)
            return token.replace(self._prefix, _CONTINUES, 1) if goes_on else token
        token = before + token.removesuffix(self._suffix)
        if self._bytes and all(letter in self._bytes for letter in token.strip()):
            return bytes(self._bytes.get(letter, 0x20) for letter in token).decode("utf-8", "backslashreplace")
        return token.replace(_SPACE, " ")

    def spans(self, caption: str) -> list[tuple[int, int]]:
        """See `Tokenizer.spans`."""
        encoding = self._model.encode(caption, add_special_tokens=False)
        if self._void.issuperset(encoding.ids):
            return []
        spans, last = [], 0
        for token, (start, end) in zip(encoding.tokens, encoding.offsets, strict=True):
            # The blank put before a word stands where the word does, as all bytes of a character stand where it does.
            start, end = _without_blanks(caption, max(start, last), end)
            last = start if token == _SPACE else max(start, end)
            spans.append((start, last))
        return spans


KINDS: dict[str, Callable[[bytes, str], Tokenizer]] = {
    ".model": SentencePieceTokenizer,
    ".txt": WordPieceTokenizer,
    ".json": HuggingFaceTokenizer,
}
"""What reads a tokenizer's bytes, by the ending of its file."""


def tokenizer_file(path: str) -> Path:
    """Where the file of a tokenizer lies, as `load_tokenizer` takes it."""
    if path == "scenes":
        return Path(__file__).with_name("scenes.model")
    file = local(path, "tokenizer")
    return file / "tokenizer.json" if path and file.is_dir() else file


def load_tokenizer(path: str, advice: str = _HOW_TO_TRAIN) -> Tokenizer:
    """Loads a tokenizer.

    Args:
        path: "scenes" for the one that comes with the built-in scenes, a SentencePiece `*.model`, a
            BERT WordPiece vocabulary `*.txt` (one token a line; taken as uncased, and captions lower-cased,
            when no piece outside `[...]` has a capital), or a `tokenizer.json` of Hugging Face, or its folder.
        advice: what to do where there is none, for the message; empty where another one is of no use.

    Raises:
        UserError: `path` is none of these, is missing or cannot be read as what its name says, or
            `tokenizers` is not installed.
    """
    file, end = tokenizer_file(path), f"; {advice}" if advice else ""
    if file.name != Path(path).name and path != "scenes" and not file.is_file():
        likely = [one.name for one in file.parent.iterdir() if one.suffix in KINDS]
        inside = sorted(name for name in likely if name.endswith(".model") or "tok" in name or "vocab" in name)
        hint = f"; did you mean {str(file.with_name(inside[0]))!r}?" if inside else end
        raise UserError(f"tokenizer={path!r} is a folder without a tokenizer.json{hint}")
    if file.suffix not in KINDS:
        raise UserError(
            f"tokenizer={path!r} is neither 'scenes' nor a SentencePiece '*.model' nor a WordPiece "
            f"vocabulary '*.txt' nor a 'tokenizer.json'{end}"
        )
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"tokenizer={path!r} cannot be read ({error.strerror}){end}") from error
    return KINDS[file.suffix](data, path)


def _without_special(spec: dict[str, Any], special: set[str]) -> dict[str, Any]:
    """A `tokenizer.json` that reads its special tokens nowhere; the ids are the same.

    Not to look for them is not enough: where the vocabulary has them (as of Unigram) the model itself may take the
    word for them. So they are called by names that no caption can have.
    """

    def hidden(token: Any) -> Any:
        return _NEVER + token if token in special else token

    model = dict(spec["model"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {hidden(token): number for token, number in model["vocab"].items()}
    else:
        model["vocab"] = [[hidden(token), score] for token, score in model["vocab"]]
    model |= {"unk_token": hidden(model["unk_token"])} if "unk_token" in model else {}
    model |= {"dropout": None} if "dropout" in model else {}
    added = [token | {"content": hidden(token["content"])} for token in spec["added_tokens"]]
    return spec | {"model": model, "added_tokens": added, "post_processor": None, "truncation": None, "padding": None}


def _bytes_of_letters() -> dict[str, int]:
    """The bytes that the letters of a byte-level vocabulary stand for (GPT-2's table)."""
    shown = [byte for byte in range(256) if chr(byte).isprintable() and byte not in (0x20, 0xA0, 0xAD)]
    others = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _import_tokenizers(what: str) -> ModuleType:
    try:
        import tokenizers
    except ImportError as error:
        raise UserError(f"{what}, which needs a package: pip install tokenizers") from error
    return tokenizers


def read_pieces(tokenizer: Tokenizer, ids: Sequence[int] | np.ndarray) -> list[str]:
    """As `Tokenizer.pieces`, but of all tokenizers alike: a blank before a piece that begins a word, no `##`."""
    pieces = tokenizer.pieces(ids)
    if not getattr(tokenizer, "has_word_pieces", False):
        return pieces
    return [piece[2:] if piece.startswith(_CONTINUES) else f" {piece}" for piece in pieces]


def _texts(captions: Sequence[bytes | str]) -> list[str]:
    return [c if isinstance(c, str) else c.decode("utf-8", "replace") for c in captions]


def _without_blanks(caption: str, start: int, end: int) -> tuple[int, int]:
    while start < end and caption[start] == " ":
        start += 1
    return start, end


def _fingerprint(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
