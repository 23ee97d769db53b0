"""What the first examples of a run are like: looked at one by one, then counted. Nothing in them can make it fail."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from m3ae_jax.data import images
from m3ae_jax.data.mixture import Member, Mixture, apportion
from m3ae_jax.data.pipeline import View
from m3ae_jax.data.sources.base import Record
from m3ae_jax.data.text import Tokenizer, clean_caption

BUDGETS = (16, 32, 48, 64, 96, 128)
WHOLE_SHARE = 0.99
"""Share of the captions that the recommended text budget leaves whole."""
SANE_LENGTH, SANE_TIMES = 256, 20
"""A caption of more tokens than the first, and than so many times its source's median, is not counted for that."""

_BUDGET_STEP = 8
_MAX_CHARS = 2**16  # of a caption, looked at
_SHOWN_CHARS = 300  # of a caption, in the report
_SAMPLES = 3  # examples in the report for each kind of fault
_TOP = 10
_CHUNK = 32
_FIRST_BYTES = 12
_UNKNOWN = ("<unk>", "[UNK]")  # the pieces of SentencePiece and of WordPiece


@dataclasses.dataclass(frozen=True)
class Place:
    """Which example: index `index` of source `source`."""

    source: str
    index: int

    def __str__(self) -> str:
        """For people."""
        return f"{self.source} example {self.index:,}"


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture as it is stored.

    Attributes:
        reason: why it cannot be used, one of `images.REASONS`; empty if it can.
        format: as Pillow names it; empty if unknown.
        digest: of its bytes.
        size: in bytes.
        start: its first bytes.
        pixels: digest of the centred square at ``data.image_size``; empty if it cannot be used.
    """

    place: Place
    reason: str
    width: int
    height: int
    format: str
    digest: bytes
    size: int
    start: bytes
    pixels: bytes


@dataclasses.dataclass(frozen=True)
class Caption:
    """A caption as it is stored.

    Attributes:
        text: cleaned, its beginning.
        digest: of its bytes as stored.
        utf8: whether they are UTF-8.
        tokens: of all of it, without a limit; words where there is no tokenizer.
        unknown: how many of them the vocabulary lacks.
    """

    place: Place
    text: str
    digest: bytes
    utf8: bool
    characters: int
    words: int
    tokens: int
    unknown: int


@dataclasses.dataclass(frozen=True)
class Sample:
    """The examples looked at of one source, or of several.

    Attributes:
        pictures: one an example; none where pictures are not trained.
        captions: all of an example, likewise.
        unreadable: examples that the source could not give, and its words.
        absent: examples that have no caption (not: an empty one) where captions are trained, and why.
    """

    examples: int
    pictures: tuple[Picture, ...]
    captions: tuple[Caption, ...]
    unreadable: tuple[tuple[Place, str], ...]
    absent: tuple[tuple[Place, str], ...] = ()


class Words:
    """Stands in for a tokenizer where none is named yet: words between blanks, numbered as they come."""

    vocab_size = 2**31 - 1
    fingerprint = "words"

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}
        self._lock = threading.Lock()

    def encode(self, captions: Sequence[bytes | str]) -> list[list[int]]:
        """As `Tokenizer.encode`."""
        texts = [c if isinstance(c, str) else c.decode("utf-8", "replace") for c in captions]
        with self._lock:
            return [[self._ids.setdefault(word, len(self._ids)) for word in text.split()] for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """As `Tokenizer.decode`."""
        return "".join(self.pieces(ids)).strip()

    def pieces(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """As `Tokenizer.pieces`."""
        words = list(self._ids)
        return [f" {words[i]}" for i in ids]

    def spans(self, caption: str) -> list[tuple[int, int]]:
        """Not needed here."""
        raise NotImplementedError


def draws(mixture: Mixture, examples: int) -> list[int]:
    """Draws of each member among the first `examples` examples of the run; at most one pass over each."""
    counts = [0] * len(mixture.members)
    rows = apportion([part.size for part in mixture.parts], max(examples, len(mixture.parts)))
    for part, slots in zip(mixture.parts, rows.tolist(), strict=True):
        taken = np.resize(part.turns, slots)
        for place, member in enumerate(part.members):
            counts[member] = min(int((taken == place).sum()), len(mixture.members[member].source))
    return counts


def look(member: Member, view: View, count: int, tokenizer: Tokenizer, config: ConfigDict) -> Sample:
    """Looks at the first candidates of draws 0 to `count` - 1 of a source."""
    kinds = [m for m in member.modalities if m in member.source.modalities]
    indices = np.asarray(view.order.index(np.arange(count, dtype=np.int64)))
    unknown = _unknown_ids(tokenizer)
    pictures: list[Picture] = []
    captions: list[Caption] = []
    unreadable: list[tuple[Place, str]] = []
    absent: list[tuple[Place, str]] = []
    with ThreadPoolExecutor(config.data.threads or len(os.sched_getaffinity(0))) as pool:
        for chunk in np.array_split(indices, -(-count // _CHUNK)) if count else ():
            places = [Place(member.name, int(index)) for index in chunk]
            readable: list[tuple[Place, Record]] = []
            for place, record in zip(places, _read(member, chunk), strict=True):
                if isinstance(record, str):
                    unreadable.append((place, record))
                else:
                    readable.append((place, record))
            if "image" in kinds:
                pictures += pool.map(lambda one: _picture(one[0], one[1], config), readable)
            if "text" in kinds:
                lacking = {place: why for place, record in readable if (why := _lacks_caption(record))}
                # Beside a picture, what else makes an example unusable is counted with the pictures.
                absent += ((p, why) for p, why in lacking.items() if why == images.NO_CAPTION or "image" not in kinds)
                captions += _captions([one for one in readable if one[0] not in lacking], tokenizer, unknown)
    return Sample(count, tuple(pictures), tuple(captions), tuple(unreadable), tuple(absent))


def _lacks_caption(record: Record) -> str:
    """Why the pipeline does not look for a caption's words, by `images.REASONS`; empty: it does."""
    return record.get("unusable") or ("" if record.get("caption") is not None else images.NO_CAPTION)


def _read(member: Member, indices: np.ndarray) -> list[Record | str]:
    """The records, or why there is none; of a chunk that fails each by itself."""
    try:
        records = list(member.source.read(indices))
        if len(records) != len(indices):
            raise ValueError(f"{len(records)} records where {len(indices)} were asked for")
        return [*records]
    except Exception as error:  # a user's own source may raise anything
        if len(indices) == 1:
            return [f"{type(error).__name__}: {error}"]
        return [one for index in indices for one in _read(member, np.array([index]))]


def _picture(place: Place, record: Record, config: ConfigDict) -> Picture:
    stored: Any = record.get("image")
    encoded = stored if isinstance(stored, bytes) else b""
    reason, width, height, kind, pixels = "", 0, 0, "", b""
    try:
        if refused := record.get("unusable"):
            raise images.Unusable(refused)
        square = images.load(encoded, config.data.image_size, max_pixels=config.data.max_pixels)
        pixels = hashlib.blake2b(square.tobytes(), digest_size=16).digest()
        width, height = images.size_of(encoded, config.data.max_pixels)
        kind = images.open_picture(encoded, config.data.max_pixels).format or ""
    except images.Unusable as error:
        reason = str(error)
    digest = hashlib.blake2b(encoded, digest_size=16).digest()
    return Picture(place, reason, width, height, kind, digest, len(encoded), encoded[:_FIRST_BYTES], pixels)


def _captions(records: list[tuple[Place, Record]], tokenizer: Tokenizer, unknown: frozenset[int]) -> list[Caption]:
    stored = [
        (place, _as_bytes(caption))
        for place, record in records
        for caption in record.get("captions") or (record.get("caption", b""),)
    ]
    texts = [clean_caption(caption, _MAX_CHARS) for _, caption in stored]
    captions = []
    for (place, raw), text, ids in zip(stored, texts, tokenizer.encode(texts), strict=True):
        digest = hashlib.blake2b(raw, digest_size=16).digest()
        counts = (len(text), len(text.split()), len(ids), sum(i in unknown for i in ids))
        captions.append(Caption(place, text[:_SHOWN_CHARS], digest, _is_utf8(raw), *counts))
    return captions


def _as_bytes(caption: Any) -> bytes:
    if isinstance(caption, str):
        return caption.encode("utf-8", "replace")
    return caption if isinstance(caption, bytes) else b""


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _unknown_ids(tokenizer: Tokenizer) -> frozenset[int]:
    if isinstance(tokenizer, Words):
        return frozenset()
    return frozenset(i for i, piece in enumerate(tokenizer.pieces(range(tokenizer.vocab_size))) if piece in _UNKNOWN)


def together(samples: Sequence[Sample]) -> Sample:
    """Several sources' examples as one."""
    return Sample(
        sum(sample.examples for sample in samples),
        tuple(picture for sample in samples for picture in sample.pictures),
        tuple(caption for sample in samples for caption in sample.captions),
        tuple(one for sample in samples for one in sample.unreadable),
        tuple(one for sample in samples for one in sample.absent),
    )


# --- statistics --------------------------------------------------------------------------------------------


def statistics(sample: Sample, config: ConfigDict, unit: str) -> dict[str, Any]:
    """All counts of a sample, as JSON takes them; shares are of the pictures, or of the captions, looked at.

    Args:
        sample: the examples.
        config: resolved.
        unit: of the captions' lengths, ``tokens`` or ``words``.
    """
    result: dict[str, Any] = {"examples": sample.examples}
    if sample.unreadable:
        first = [{**_at(place), "error": error} for place, error in sample.unreadable[:_SAMPLES]]
        result["unreadable"] = {**_share(len(sample.unreadable), sample.examples), "examples": first}
    if sample.pictures:
        result["pictures"] = _picture_statistics(sample.pictures, config.data.image_size)
    if sample.captions or sample.absent:
        counted = _caption_statistics(sample.captions, config.data.max_text_tokens)
        result["captions"] = counted | _wordless(sample) | {"unit": unit}
    result["replaced"] = _share(len(_replaced(sample)), sample.examples)
    return result


def _wordless(sample: Sample) -> dict[str, Any]:
    """Examples without a caption, and with them those without a word in any of theirs; shares are of the examples."""
    with_words = {caption.place for caption in sample.captions if caption.tokens}
    without = _wordless_places(sample)
    examples = len(with_words) + len(without) + len(sample.absent)
    reasons = {}
    for why, count in Counter(why for _, why in sample.absent).most_common():
        first = [_at(place) for place, other in sample.absent if other == why][:_SAMPLES]
        reasons[why] = {**_share(count, examples), "examples": first}
    return {
        "absent": {**_share(len(sample.absent), examples), "reasons": reasons},
        "without_words": _share(len(without) + len(sample.absent), examples),
    }


def _wordless_places(sample: Sample) -> set[Place]:
    """Examples with captions of which none has a word that the tokenizer knows."""
    captions = sample.captions
    return {one.place for one in captions} - {one.place for one in captions if one.tokens}


def _replaced(sample: Sample) -> set[Place]:
    """Examples in whose place the pipeline would take others; of a text that stands alone those without words too."""
    places = {place for place, _ in sample.absent} | {picture.place for picture in sample.pictures if picture.reason}
    return places if sample.pictures else places | _wordless_places(sample)


def _at(place: Place) -> dict[str, Any]:
    return dataclasses.asdict(place)


def _share(count: int, of: int) -> dict[str, Any]:
    return {"count": count, "share": count / of if of else 0.0}


def _picture_statistics(pictures: tuple[Picture, ...], image_size: int) -> dict[str, Any]:
    usable = [picture for picture in pictures if not picture.reason]
    counts = Counter(picture.reason for picture in pictures if picture.reason)
    unusable = {}
    for reason, count in counts.most_common():
        bad = [p for p in pictures if p.reason == reason][:_SAMPLES]
        first = [{**_at(p.place), "bytes": p.size, "first_bytes": p.start.hex(" ")} for p in bad]
        unusable[reason] = {**_share(count, len(pictures)), "examples": first}
    small = sum(min(picture.width, picture.height) < image_size for picture in usable)
    digests = [picture.digest for picture in pictures if picture.size]
    result: dict[str, Any] = {
        "count": len(pictures),
        "usable": len(usable),
        "unusable": unusable,
        "unusable_share": 1 - len(usable) / len(pictures),
        "formats": dict(Counter(picture.format for picture in usable).most_common()),
        "smaller_than_image_size": _share(small, len(usable)),
        "repeated": _share(len(digests) - len(set(digests)), len(pictures)),
    }
    if usable:
        result["shorter_side"] = _spread([min(picture.width, picture.height) for picture in usable])
        result["width"] = _spread([picture.width for picture in usable])
        result["height"] = _spread([picture.height for picture in usable])
        by_area = sorted(usable, key=lambda picture: picture.width * picture.height)
        by_aspect = sorted(usable, key=lambda picture: picture.width / picture.height)
        extremes = {"smallest": by_area[0], "largest": by_area[-1], "narrowest": by_aspect[0], "widest": by_aspect[-1]}
        result |= {name: {**_at(p.place), "width": p.width, "height": p.height} for name, p in extremes.items()}
    return result


def _caption_statistics(captions: tuple[Caption, ...], budget: int) -> dict[str, Any]:
    known = [caption for caption in captions if caption.tokens]
    blank = sum(not caption.text for caption in captions)
    tokens = sum(caption.tokens for caption in known)
    digests = Counter(caption.digest for caption in captions if caption.text)
    texts = {caption.digest: caption for caption in captions}
    top = [(texts[digest], count) for digest, count in digests.most_common(_TOP) if count > 1]
    result: dict[str, Any] = {
        "count": len(captions),
        "empty": _share(blank, len(captions)),
        "unknown_words_alone": _share(len(captions) - len(known) - blank, len(captions)),
        "not_utf8": _share(sum(not caption.utf8 for caption in captions), len(captions)),
        "unknown_tokens": _share(sum(caption.unknown for caption in known), tokens),
        "repeated": _share(digests.total() - len(digests), len(captions)),
        "most_repeated": [{"caption": c.text, "count": n, **_at(c.place)} for c, n in top],
    }
    return result | (_length_statistics(known, budget) if known else {})


def _length_statistics(known: list[Caption], budget: int) -> dict[str, Any]:
    """Of captions that have a word, at least one."""
    longest = max(known, key=lambda caption: caption.tokens)
    lengths = np.array([caption.tokens for caption in known])
    limits = sane_lengths(known)
    sane = np.array([caption.tokens <= limits[caption.place.source] for caption in known])
    endless = [caption for caption, is_sane in zip(known, sane, strict=True) if not is_sane]
    return {
        "tokens": _spread(lengths),
        "words": _spread([caption.words for caption in known]),
        "characters": _spread([caption.characters for caption in known]),
        "lengths": {str(n): count for n, count in sorted(Counter(lengths.tolist()).items())},
        "longest": _worded(longest),
        "cut": {str(b): _share(int((lengths > b).sum()), len(known)) for b in sorted({*BUDGETS, budget})},
        "max_text_tokens": budget,
        "endless": {
            **_share(len(endless), len(known)),
            "more_than": min(limits.values()),
            "examples": [_worded(caption) for caption in endless[:_SAMPLES]],
        },
        "recommended": recommended_budget(lengths[sane]),
    }


def _worded(caption: Caption) -> dict[str, Any]:
    return {"caption": caption.text, "tokens": caption.tokens, **_at(caption.place)}


def sane_lengths(captions: Sequence[Caption]) -> dict[str, int]:
    """Tokens of a caption, by source, above which it does not count for the advice: a page of text is no caption."""
    lengths: dict[str, list[int]] = {}
    for caption in captions:
        lengths.setdefault(caption.place.source, []).append(caption.tokens)
    return {name: max(SANE_LENGTH, round(SANE_TIMES * float(np.median(of)))) for name, of in lengths.items()}


def recommended_budget(lengths: np.ndarray) -> int:
    """The smallest multiple of 8 that leaves `WHOLE_SHARE` of captions of these lengths (`[n] int`, n >= 1) whole."""
    whole = int(np.ceil(WHOLE_SHARE * len(lengths) - 1e-9))
    reaching = int(np.sort(lengths)[whole - 1])
    return max(-(-reaching // _BUDGET_STEP), 1) * _BUDGET_STEP


def _spread(values: Sequence[int] | np.ndarray) -> dict[str, float]:
    least, median, p95, p99, most = np.percentile(values, (0, 50, 95, 99, 100)).tolist()
    return {"least": least, "median": median, "p95": p95, "p99": p99, "most": most, "mean": float(np.mean(values))}
