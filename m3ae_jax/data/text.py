"""Captions to token ids and back.

SentencePiece models run through the `sentencepiece` package's batch encoder: C++ with the interpreter lock
released, called once per batch from a `tf.numpy_function`. It is a required package already; tensorflow-text
would do the same in the graph, but is one more package, pinned to tensorflow's version. BERT's WordPiece
vocabularies run through the `tokenizers` package (a batch encoder in Rust), the optional extra
`m3ae_jax[wordpiece]`, imported only when such a vocabulary is loaded.

What holds for both:

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
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import sentencepiece as spm

from m3ae_jax.errors import UserError

# Characters left before tokenizing, for each token of the budget: a piece has at most 16 characters in models that
# train_tokenizer makes, so twice that does not change the first `max_tokens` tokens.
CHARS_PER_TOKEN = 32

_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f]")  # Unicode's Cc without its blanks
_SPACE = "\u2581"  # SentencePiece's mark for a blank before a piece
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
        """The piece of each of `[n]` ids, for people to read: with its leading blank or WordPiece's `##`."""

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


def load_tokenizer(path: str) -> Tokenizer:
    """Loads a tokenizer.

    Args:
        path: "scenes" for the one that comes with the built-in scenes, a SentencePiece `*.model`, or a
            BERT WordPiece vocabulary `*.txt` (one token a line; taken as uncased, and captions lower-cased,
            when no piece outside `[...]` has a capital).

    Raises:
        UserError: `path` is none of these, is missing or cannot be read as what its name says, or
            `tokenizers` is not installed.
    """
    file = Path(__file__).with_name("scenes.model") if path == "scenes" else Path(path).expanduser()
    if file.suffix not in (".model", ".txt"):
        raise UserError(
            f"tokenizer={path!r} is neither 'scenes' nor a SentencePiece '*.model' nor a WordPiece "
            f"vocabulary '*.txt'; {_HOW_TO_TRAIN}"
        )
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"tokenizer={path!r} cannot be read ({error.strerror}); {_HOW_TO_TRAIN}") from error
    return SentencePieceTokenizer(data, path) if file.suffix == ".model" else WordPieceTokenizer(data, path)


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
            raise UserError(f"tokenizer={name!r} is not a SentencePiece model; {_HOW_TO_TRAIN}") from error
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

    def __init__(self, vocabulary: bytes, name: str) -> None:
        """Loads a vocabulary.

        Args:
            vocabulary: the file's bytes: UTF-8, one token a line, the line's number its id.
            name: what to call it in an error.

        Raises:
            UserError: it has no `[UNK]`, is not UTF-8, or the package `tokenizers` is missing.
        """
        try:
            import tokenizers
        except ImportError as error:
            raise UserError(
                f"tokenizer={name!r} is a WordPiece vocabulary, which needs a package: pip install tokenizers"
            ) from error
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


def read_pieces(tokenizer: Tokenizer, ids: Sequence[int] | np.ndarray) -> list[str]:
    """As `Tokenizer.pieces`, but of all tokenizers alike: a blank before a piece that begins a word, no `##`."""
    pieces = tokenizer.pieces(ids)
    if not isinstance(tokenizer, WordPieceTokenizer):
        return pieces
    return [piece[2:] if piece.startswith("##") else f" {piece}" for piece in pieces]


def _texts(captions: Sequence[bytes | str]) -> list[str]:
    return [c if isinstance(c, str) else c.decode("utf-8", "replace") for c in captions]


def _without_blanks(caption: str, start: int, end: int) -> tuple[int, int]:
    while start < end and caption[start] == " ":
        start += 1
    return start, end


def _fingerprint(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
