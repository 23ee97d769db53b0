"""The annotation files of this field, told by their keys: which layout a file has, and how much is in it.

A layout is recognised, counted, and compared with a folder of pictures; of those with captions the captions are read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import mmap
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from m3ae_jax.data.sources.base import IMAGE_EXTENSIONS

MAX_FILE_BYTES = 2**29
"""A larger JSON document is not looked at; of larger JSON lines as many bytes are."""

_HEAD = 2**20  # bytes in which a file must name a key of some layout
_MOST_FOLDERS = 100  # directly in that of the pictures, that are looked into
_LIST, _LINES, _VALUES = "list", "lines", "values"

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Annotations:
    """What an annotation file, or a folder laid out in a known way, holds.

    Attributes:
        path: the file or folder.
        layout: its name for people.
        counts: how many there are of each kind, as ``{"images": 5, "captions": 25}``.
        splits: rows (shards of a folder) by the name of their split; empty where the file does not say.
        pictures: names of the pictures, each once; some layouts leave out the ending.
        missing: of `pictures`, those that are not in the folder given; of a folder its missing shards.
        unknown: keys that the layout does not have, sorted.
        malformed: rows that lack keys of the layout; they are counted nowhere else.
        whole: False where the file is so large that only its beginning was read.
    """

    path: Path
    layout: str
    counts: dict[str, int]
    splits: dict[str, int]
    pictures: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    malformed: int = 0
    whole: bool = True

    def __str__(self) -> str:
        """One line for people."""
        counts = ", ".join(number_of(count, noun) for noun, count in self.counts.items())
        splits = ", ".join(f"{name} {count:,}" for name, count in self.splits.items())
        text = f"{self.path.name} looks like {self.layout}: {counts}" + (f" ({splits})" if splits else "")
        if self.malformed:
            text += f"; {number_of(self.malformed, 'rows')} without the keys of the layout"
        if self.unknown:
            text += f"; keys that the layout does not have: {', '.join(self.unknown)}"
        return text + ("" if self.whole else f"; only its first {MAX_FILE_BYTES:,} bytes were read")


def number_of(count: int, nouns: str) -> str:
    """``1 example``, ``2,000 examples``; the noun is given in the plural and loses its last letter."""
    return f"{count:,} {nouns[:-1] if count == 1 else nouns}"


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a file is laid out.

    Attributes:
        name: for people.
        rows: where its rows are: a JSON `list`, JSON `lines`, the `values` of an object, or under this key of one.
        needs: keys of each row.
        may_have: further keys of rows.
        document: further keys of the object around the rows.
        nouns: what a row's texts are, in the plural.
        apart: other nouns for a row whose texts are counted apart; empty: it has none.
        texts: how many a row has.
        pictures: names of a row's pictures; of the row and the object around it.
        listed: key of a list of ``file_name`` in the object around the rows, in place of `pictures`.
        split: of a row and the object around it; empty where it is not said.
        fits: tells layouts of the same keys apart, by a row.
        captions: of a row of a picture; None: its texts are no captions.
    """

    name: str
    rows: str
    needs: frozenset[str]
    may_have: frozenset[str] = frozenset()
    document: frozenset[str] = frozenset()
    nouns: str = "captions"
    apart: Callable[[Row], str] = lambda row: ""
    texts: Callable[[Row], int] = lambda row: 1
    pictures: Callable[[Row, Row], Iterable[str]] = lambda row, document: (row["image"],)
    listed: str = ""
    split: Callable[[Row, Row], str] = lambda row, document: ""
    fits: Callable[[Row], bool] = lambda row: True
    captions: Callable[[Row], Iterable[str]] | None = None

    def rows_of(self, document: Any) -> list[Any]:
        """The rows of a parsed document; none where it is of another shape."""
        if self.rows in (_LIST, _LINES):
            return document if isinstance(document, list) else []
        if not isinstance(document, dict):
            return []
        if self.rows == _VALUES:
            return list(document.values())
        rows = document.get(self.rows)
        return rows if isinstance(rows, list) else []

    def has(self, row: Any) -> bool:
        """Whether a row is of this layout."""
        return isinstance(row, dict) and self.needs <= row.keys() and self.fits(row)


def _keys(names: str) -> frozenset[str]:
    return frozenset(names.split())


# --- what rows say -----------------------------------------------------------------------------------------


def _texts_of(row: Row) -> list[str]:
    return row["caption"] if isinstance(row["caption"], list) else [row["caption"]]


def _karpathy_captions(row: Row) -> list[str]:
    return [one["raw"] if "raw" in one else " ".join(one["tokens"]) for one in row["sentences"]]


def _karpathy_picture(row: Row, _: Row) -> tuple[str]:
    return (f"{row['filepath']}/{row['filename']}" if row.get("filepath") else row["filename"],)


def _karpathy_split(row: Row, _: Row) -> str:
    split = str(row.get("split", ""))
    return "train" if split == "restval" else split  # what was held back from COCO's validation is trained on


def _vqa_picture(row: Row, document: Row) -> tuple[str]:
    subset = str(document.get("data_subtype", "")).replace("test-dev", "test")
    return (f"COCO_{subset}_{int(row['image_id']):012d}.jpg",)


def _nlvr2_pictures(row: Row, _: Row) -> tuple[str, str]:
    pair = row["identifier"].rpartition("-")[0]  # the identifier is split-set-pair-sentence
    folder = f"{row['directory']}/" if "directory" in row else ""
    return f"{folder}{pair}-img0.png", f"{folder}{pair}-img1.png"


def _snli_ve_picture(row: Row, _: Row) -> tuple[str]:
    identity = row.get("Flickr30K_ID") or row.get("Flikr30kID")  # the second is how the older release spells it
    return (f"{identity or row['pairID'].partition('.jpg')[0]}.jpg",)


def _is_snli_ve(row: Row) -> bool:
    return bool(_keys("Flickr30K_ID Flikr30kID") & row.keys()) or ".jpg" in str(row["pairID"])


def _has_captions_by_list(row: Row) -> bool:
    """ALBEF's retrieval evaluation, not its pretraining, which names pictures by absolute paths."""
    return isinstance(row["caption"], list) and not os.path.isabs(str(row["image"]))


_COCO = _keys("info licenses images categories type")
_VQA = _keys("info task_type data_type data_subtype license")
_ARO = _keys("image_id bbox_x bbox_y bbox_w bbox_h relation_name attributes obj1_name obj2_name")

LAYOUTS = (
    Layout(
        "Karpathy's splits",
        "images",
        _keys("filename sentences"),
        _keys("filepath sentids imgid split cocoid"),
        _keys("dataset"),
        texts=lambda row: len(row["sentences"]),
        pictures=_karpathy_picture,
        split=_karpathy_split,
        captions=_karpathy_captions,
    ),
    Layout(
        "COCO captions",
        "annotations",
        _keys("image_id caption"),
        _keys("id"),
        _COCO,
        listed="images",
        captions=lambda row: [row["caption"]],
    ),
    Layout(
        "COCO instances",
        "annotations",
        _keys("image_id bbox category_id"),
        _keys("id segmentation area iscrowd keypoints num_keypoints"),
        _COCO,
        nouns="objects",
        listed="images",
    ),
    Layout(
        "VQA v2 questions",
        "questions",
        _keys("image_id question question_id"),
        document=_VQA,
        nouns="questions",
        pictures=_vqa_picture,
        split=lambda row, document: str(document.get("data_subtype", "")),
    ),
    Layout(
        "VQA v2 answers",
        "annotations",
        _keys("image_id question_id answers"),
        _keys("question_type answer_type multiple_choice_answer"),
        _VQA,
        nouns="questions",
        pictures=_vqa_picture,
        split=lambda row, document: str(document.get("data_subtype", "")),
    ),
    Layout(
        "SugarCrepe",
        _VALUES,
        _keys("filename caption negative_caption"),
        nouns="caption pairs",
        pictures=lambda row, document: (row["filename"],),
    ),
    *(
        Layout(
            f"ARO {kind}",
            _LIST,
            _keys(f"image_path true_caption false_caption {key}"),
            _ARO,
            nouns="caption pairs",
            pictures=lambda row, document: (row["image_path"],),
        )
        for kind, key in (("relation", "relation_name"), ("attribution", "attributes"))
    ),
    *(
        Layout(
            f"ALBEF's VQA list ({use})",
            _LIST,
            _keys(f"image question {key}"),
            _keys("dataset question_id"),
            nouns="questions",
            split=lambda row, document: str(row.get("dataset", "")),
        )
        for use, key in (("training", "answer"), ("evaluation", "question_id"))
    ),
    Layout(
        "ALBEF's NLVR list",
        _LIST,
        _keys("images sentence label"),
        nouns="sentences",
        pictures=lambda row, document: row["images"],
    ),
    Layout(
        "ALBEF's visual entailment list",
        _LIST,
        _keys("image sentence label"),
        nouns="sentences",
        pictures=lambda row, document: (f"{row['image']}.jpg",),
    ),
    Layout("ALBEF's grounding list (evaluation)", _LIST, _keys("image text ref_id"), nouns="sentences"),
    Layout("ALBEF's grounding list (training)", _LIST, _keys("image text"), nouns="sentences"),
    *(
        Layout(
            f"ALBEF's {name}",
            _LIST,
            _keys(keys),
            texts=lambda row: len(_texts_of(row)),
            fits=fits,
            captions=_texts_of,
        )
        for name, keys, fits in (
            ("retrieval list (training)", "image caption image_id", lambda row: True),
            ("retrieval list (evaluation)", "image caption", _has_captions_by_list),
            ("pretraining list", "image caption", lambda row: True),
        )
    ),
    Layout(
        "NLVR2",
        _LINES,
        _keys("sentence label identifier"),
        _keys("left_url right_url synset query writer validation extra_validations directory"),
        nouns="sentences",
        pictures=_nlvr2_pictures,
        split=lambda row, document: row["identifier"].partition("-")[0],
    ),
    Layout(
        "SNLI-VE",
        _LINES,
        _keys("gold_label sentence2 pairID"),
        _keys(
            "sentence1 Flickr30K_ID Flikr30kID captionID annotator_labels sentence1_parse sentence2_parse "
            "sentence1_binary_parse sentence2_binary_parse"
        ),
        nouns="sentences",
        apart=lambda row: "undecided sentences" if row["gold_label"] == "-" else "",
        pictures=_snli_ve_picture,
        fits=_is_snli_ve,
    ),
    Layout(
        "Winoground",
        _LINES,
        _keys("image_0 image_1 caption_0 caption_1"),
        _keys("id tag secondary_tag num_main_preds collapsed_tag"),
        texts=lambda row: 2,
        pictures=lambda row, document: (row["image_0"], row["image_1"]),
    ),
)
"""The first that fits is taken: of layouts whose keys include another's, the one with more keys stands first."""

_KEYS = re.compile("|".join(f'"{key}"' for one in LAYOUTS for key in sorted(one.needs | {one.rows, "images"})).encode())


# --- captions ----------------------------------------------------------------------------------------------


class Captioned(NamedTuple):
    """A picture with its captions.

    Attributes:
        picture: its name, as the layout gives it.
        captions: of it, without blanks around.
        split: to which it belongs; empty where the file does not say.
    """

    picture: str
    captions: tuple[str, ...]
    split: str


def captioned(path: Path) -> list[Captioned | None] | None:
    """The pictures of a file with captions, each once, in their order; a row that is damaged is None.

    Args:
        path: of a JSON document: Karpathy's splits, COCO's captions, or one of ALBEF's lists. None: it is none of
            these.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        whole = 0 < os.fstat(file.fileno()).st_size <= MAX_FILE_BYTES  # an empty file cannot be mapped
        # Without parsing what may be half a gigabyte of boxes.
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if whole else contextlib.nullcontext(b"") as content:
            if all(content.find(key) < 0 for key in (b'"caption"', b'"sentences"')):
                return None
            try:
                document = json.loads(content[:])
            except (ValueError, RecursionError, MemoryError):
                return None
    layout = next((one for one in LAYOUTS if one.rows != _LINES and _begins_as(one, document)), None)
    if layout is None or layout.captions is None:
        return None
    found: dict[str, tuple[list[str], str]] = {}
    damaged = 0
    names = {one["id"]: one["file_name"] for one in _listed(layout, document) if isinstance(one.get("id"), int | str)}
    for row in layout.rows_of(document):
        try:
            if layout.listed:
                picture = str(names[row["image_id"]])
            else:
                (picture,) = (str(name) for name in layout.pictures(row, document))
            captions = [caption.strip() for caption in layout.captions(row)]
            split = layout.split(row, document)
        except (LookupError, TypeError, ValueError, AttributeError):  # whatever a hand wrote in place of a row
            damaged += 1
            continue
        found.setdefault(picture, ([], split))[0].extend(captions)
    rows = [Captioned(picture, tuple(captions), split) for picture, (captions, split) in found.items()]
    return [*rows, *[None] * damaged]


def _listed(layout: Layout, document: Any) -> list[Row]:
    """The pictures that the object around the rows lists."""
    listed = document.get(layout.listed) if layout.listed else None
    entries = listed if isinstance(listed, list) else []
    return [one for one in entries if isinstance(one, dict) and "file_name" in one]


# --- recognising -------------------------------------------------------------------------------------------


def recognise(path: Path, pictures: Path | None = None) -> Annotations | None:
    """Tells which annotation file of this field one is; None: none that is known, or one that cannot be read.

    Args:
        path: a .json or .jsonl file, or a folder (which may be one of CLIP_benchmark's).
        pictures: folder in which its pictures should be; None: that is not looked up.
    """
    try:
        if path.is_dir():
            return _clip_benchmark(path)
        return _recognise_file(path, pictures)
    except (OSError, ValueError, RecursionError, MemoryError):
        return None


def _recognise_file(path: Path, pictures: Path | None) -> Annotations | None:
    """As `recognise`.

    Raises:
        OSError, ValueError, RecursionError, MemoryError: the file cannot be read or is no JSON.
    """
    with open(path, "rb") as file:
        head = file.read(_HEAD)
        if not _KEYS.search(head):
            return None
        first = _parsed(head.lstrip().partition(b"\n")[0])
        layout = next((one for one in LAYOUTS if one.rows == _LINES and one.has(first)), None)
        whole = os.fstat(file.fileno()).st_size <= MAX_FILE_BYTES
        if layout is None and not whole:
            return None
        text = head + file.read(MAX_FILE_BYTES - len(head))
    if layout is not None:
        lines = text.splitlines() if whole else text.splitlines()[:-1]  # the last one is cut off
        rows, document = [_parsed(line) for line in lines if line.strip()], {}
    else:
        document = json.loads(text)
        layout = next((one for one in LAYOUTS if one.rows != _LINES and _begins_as(one, document)), None)
        if layout is None:
            return None
        rows = layout.rows_of(document)
    found = _counted(path, layout, rows, document if isinstance(document, dict) else {})
    missing = _missing(found.pictures, pictures) if pictures else ()
    return dataclasses.replace(found, missing=missing, whole=whole)


def _parsed(line: bytes) -> Any:
    """A line of JSON; None where it is none."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _begins_as(layout: Layout, document: Any) -> bool:
    return layout.has(next((row for row in layout.rows_of(document) if isinstance(row, dict)), None))


def _counted(path: Path, layout: Layout, rows: list[Any], document: Row) -> Annotations:
    """What rows of a layout hold."""
    names: dict[str, None] = {}  # in their order, each once
    splits: Counter[str] = Counter()
    keys: set[str] = set()
    texts: Counter[str] = Counter({layout.nouns: 0})
    malformed = 0
    for row in rows:
        try:
            if not layout.needs <= row.keys():
                raise KeyError
            count, split = layout.texts(row), layout.split(row, document)
            shown = [] if layout.listed else [str(name) for name in layout.pictures(row, document)]
        except (LookupError, TypeError, ValueError, AttributeError):  # whatever a hand wrote in place of a row
            malformed += 1
            continue
        keys |= row.keys()
        texts[layout.apart(row) or layout.nouns] += count
        names |= dict.fromkeys(shown)
        splits[split] += bool(split)
    if layout.listed:
        names = dict.fromkeys(str(one["file_name"]) for one in _listed(layout, document))
    unknown = keys - layout.needs - layout.may_have
    if layout.rows not in (_LIST, _LINES, _VALUES):
        unknown |= document.keys() - layout.document - {layout.rows}
    counts = {"images": len(names), **texts}
    found = tuple(sorted(unknown))
    return Annotations(path, layout.name, counts, dict(+splits), tuple(names), unknown=found, malformed=malformed)


def _missing(names: Iterable[str], folder: Path) -> tuple[str, ...]:
    """The pictures that are neither at their path below the folder nor, by their base name, in it or directly below."""
    listings: dict[Path, set[str]] = {}

    def holds(parent: Path, name: str) -> bool:
        if parent not in listings:
            listings[parent] = _listing(parent)
        return name in listings[parent]

    def is_there(name: str) -> bool:
        path = folder / name
        return holds(path.parent, path.name) or holds(folder, path.name)

    missing = tuple(name for name in names if not is_there(name))
    for below in _folders(folder) if missing else ():
        there = _listing(below)
        missing = tuple(name for name in missing if os.path.basename(name) not in there)
    return missing


def _folders(folder: Path) -> list[Path]:
    """The first of the folders directly in one."""
    try:
        return sorted(Path(entry) for entry in os.scandir(folder) if entry.is_dir())[:_MOST_FOLDERS]
    except OSError:
        return []


def _listing(folder: Path) -> set[str]:
    """Names of the files of a folder, those of pictures without their ending too."""
    try:
        names = os.listdir(folder)
    except (OSError, ValueError):
        return set()
    stems = (os.path.splitext(name) for name in names)
    return {*names, *(stem for stem, ending in stems if ending.lower() in IMAGE_EXTENSIONS)}


def _clip_benchmark(folder: Path) -> Annotations | None:
    """A folder of CLIP_benchmark's: ``{split}/nshards.txt`` says how many ``{split}/N.tar`` there are."""
    splits = {entry.name: Path(entry) for entry in os.scandir(folder) if entry.is_dir()}
    splits = {name: path for name, path in sorted(splits.items()) if (path / "nshards.txt").is_file()}
    root = folder
    if not splits and (folder / "nshards.txt").is_file():
        splits, root = {folder.name: folder}, folder.parent
    if not splits:
        return None
    sizes = {name: int((path / "nshards.txt").read_text(encoding="utf-8")) for name, path in splits.items()}
    names = [f"{name}/{number}.tar" for name, size in sizes.items() for number in range(min(size, 10**6))]
    missing = tuple(name for name in names if not (root / name).is_file())
    told = root / "dataset_type.txt"
    kind = told.read_text(encoding="utf-8").strip() if told.is_file() else "classification"
    counts = {"shards": sum(sizes.values())}
    classes = root / "classnames.txt"
    if classes.is_file():
        counts["class names"] = len(classes.read_text(encoding="utf-8").splitlines())
    return Annotations(folder, f"a CLIP_benchmark folder for {kind[:40]}", counts, sizes, missing=missing)
