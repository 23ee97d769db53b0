r"""Turns any source into ArrayRecord files, which are fast to read at random.

    python -m m3ae_jax.data.prepare --source=webdataset --path=SHARDS --output=DIR

writes ``DIR/train.array_record-00000-of-00010`` and so on: records are `tf.train.Example` with `image` (the encoded
picture), `caption` (one or several) and `label` (where the source has labels); the classes' names are the lines of
``DIR/classes.txt``. Pictures whose short side exceeds `--short_side` pixels are shrunk to it, upright, and stored as
JPEG; the others stay byte for byte. Pictures that do not decode are left out and counted (`--check=false` leaves
them in), and so are examples without a caption in a source that has captions. What the source itself left out, and
what of it is not read, is told at the end as well. With `--format=tfds` the folder also opens with
`tfds.builder_from_directory`; as TensorFlow Datasets decodes neither WebP, GIF and BMP nor palettes, CMYK, 16 bits and
transparency as one would wish, such pictures become JPEG or, where nothing was lost before, PNG.

Each file holds a fixed range of the source, in its order, so the same source and options give the same bytes with any
number of `--workers`. A file gets its name once it is whole, and is then listed in ``DIR/train.manifest.json``: the
same command, started again after an interruption of any kind, goes on with the rest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from array_record.python import array_record_module
from PIL import Image

from m3ae_jax import command_line, console
from m3ae_jax.data import images
from m3ae_jax.data.sources import SOURCES, open_format
from m3ae_jax.data.sources.base import CAPTIONS, MAX_BYTES, Record, Source, SourceOptions, report_of
from m3ae_jax.data.sources.files import is_remote
from m3ae_jax.data.sources.index import IndexReport, Tally, skip_line, unused_line
from m3ae_jax.data.sources.splits import MANIFEST
from m3ae_jax.errors import STOPPED, UserError, one_of
from m3ae_jax.paths import local

FORMATS = ("array_record", "tfds")

_READ = ("split", "image_key", "caption_key", "label_key", "captions", "template", "caption_per_line", "max_bytes")
_VERSION = 1  # of the manifest; raise it when the same options give other files
_WRITER_OPTIONS = "group_size:1"  # a record a chunk: reading one does not decompress others
_BLOCK = 64  # records read at once
_PROBE = 8  # pixels; to see whether a picture decodes: all its data are read, few of its pixels made
_MAX_JPEG_SIDE = 65_500  # libjpeg's JPEG_MAX_DIMENSION
_NO_LABEL = -1  # as TensorFlow Datasets marks an example without one
_CLASS_NAMES = "classes.txt"
_TFDS_FILES = ("label.labels.txt", "features.json", "dataset_info.json")  # the last one makes it a data set
_TERMINAL_SECONDS, _LOG_SECONDS = 2.0, 30.0


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to be made of what.

    Attributes:
        source: one of `sources.SOURCES`, or ``package.module:Class``.
        path: its files.
        output: the folder to write; it is made.
        read: how the source is read.
        name: of what is written, a split of `output`; empty: as `read.split`.
        format: ``array_record``, or ``tfds`` for the metadata of TensorFlow Datasets beside such files.
        short_side: pictures with a longer short side are shrunk to it, pixels; 0: none is.
        quality: of the JPEGs made, 1 to 100.
        shard_examples: examples of the source a file; a file has fewer where some are left out.
        check: leave out pictures that do not decode.
        workers: files written at a time; 0: one a core.
        verify: on going on, read the finished files and compare their hashes.
    """

    source: str
    path: str
    output: str
    read: SourceOptions = SourceOptions()
    name: str = ""
    format: str = "array_record"
    short_side: int = 256
    quality: int = 95
    shard_examples: int = 10_000
    check: bool = True
    workers: int = 0
    verify: bool = False

    def options(self) -> dict[str, Any]:
        """Those that the files' contents depend on."""
        own = ("format", "short_side", "quality", "shard_examples", "check")
        options = {name: getattr(self, name) for name in own} | {name: getattr(self.read, name) for name in _READ}
        other = {"read_split": self.read.split} if self.split != self.read.split else {}
        return options | {"split": self.split} | other

    @property
    def split(self) -> str:
        """The name of what is written."""
        return self.name or self.read.split


@dataclasses.dataclass(frozen=True)
class Summary:
    """What was written, this time and before.

    Attributes:
        report: files, examples, and those left out by reason with the first of each.
        source: what the source left out itself, and what of it is not read; None where it does not say.
        encoded: pictures encoded anew.
        bytes: of all files.
        reused: files that were there already.
    """

    report: IndexReport
    source: IndexReport | None
    encoded: int
    bytes: int
    reused: int


def prepare(job: Job) -> Summary:
    """Writes the files that are not there yet.

    Args:
        job: what is to be made.

    Raises:
        UserError: a mistake in `job`, an output of other options or of another source, one that cannot be written,
            a source that cannot be read, or one of whose pictures none decodes.
    """
    _check(job)
    source = _open_source(job)
    output = local(job.output, "--output").absolute()
    with _reporting_writes(job), _locked(output, job.split):
        manifest = _Manifest.open(job, source, output)
        _write_classes(output, job.output, source.classes)
        todo = manifest.unfinished(job.verify)
        _write_shards(job, source, manifest, todo)
        summary = manifest.summary(manifest.number_of_shards - len(todo), report_of(source))
        if not summary.report.examples:
            raise UserError(f"output={job.output!r}: no example is left ({skip_line(summary.report)})")
        if job.format == "tfds":
            _write_tfds_metadata(output)
    return summary


# --- before the start --------------------------------------------------------------------------------------


def _check(job: Job) -> None:
    if job.format not in FORMATS:
        raise UserError(one_of("format", job.format, FORMATS))
    if job.read.captions not in CAPTIONS:
        raise UserError(one_of("captions", job.read.captions, CAPTIONS))
    if not re.fullmatch(r"[A-Za-z0-9][\w-]*", job.split, re.ASCII):
        field = "name" if job.name else "split"
        raise UserError(f"{field}={job.split!r} names the files: it takes letters, digits, _ and - only")
    for name, least in (("short_side", 0), ("quality", 1), ("shard_examples", 1), ("workers", 0)):
        if getattr(job, name) < least:
            raise UserError(f"{name}={getattr(job, name)} must be at least {least}")
    if job.quality > 100:
        raise UserError(f"quality={job.quality} must be at most 100")
    if not job.output or is_remote(job.output):
        raise UserError(f"output={job.output!r} must be a local folder")
    if os.path.realpath(os.path.expanduser(job.path)) == os.path.realpath(os.path.expanduser(job.output)):
        raise UserError(f"output={job.output!r} is where the source is read from; name another folder")


def _open_source(job: Job) -> Source:
    if job.source == "scenes":
        raise UserError("source='scenes' is drawn, not stored: there is nothing to prepare")
    try:
        source = open_format(job.source, job.path, job.read, "")
    except UserError as error:
        if job.name or not str(error).startswith("split="):
            raise
        raise UserError(f"{error}; name={job.read.split!r} instead names the files alone") from None
    if job.format == "tfds" and len(set(source.classes)) < len(source.classes):
        raise UserError("format='tfds' allows no two classes of the same name; use format=array_record")
    return source


@contextlib.contextmanager
def _reporting_writes(job: Job) -> Iterator[None]:
    """Says in one line that the output cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(f"output={job.output!r} cannot be written ({error.strerror or error})") from error


@contextlib.contextmanager
def _locked(output: Path, split: str) -> Iterator[None]:
    """Makes the folder and locks this split for other processes; the lock of a killed one is free at once."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / f".{split}.lock"
    with open(path, "ab") as file:  # a link there is not to empty what it leads to
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"output={str(output)!r}: another process is writing its split {split!r} now") from None
        except OSError:
            pass  # a file system without locks
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _write_classes(output: Path, named: str, classes: tuple[str, ...]) -> None:
    """Writes the classes' names, a line each; the splits of a folder share them."""
    lines = [" ".join(name.split()) for name in classes]
    if not lines:
        return
    if not all(lines):
        raise UserError(f"class {lines.index('')} of the source has no name, and {_CLASS_NAMES} can hold none such")
    text, path = "".join(f"{line}\n" for line in lines).encode("utf-8", "backslashreplace"), output / _CLASS_NAMES
    if path.exists() and path.read_bytes() != text:
        raise UserError(f"output={named!r}: its {_CLASS_NAMES} has other classes than this source; name another folder")
    _write_atomically(path, text)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A new file beside `path`, which takes its place once it is on the disk.

    Its name is always the same, so that nothing stays of a process that was killed.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # a link there would be written through
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_atomically(path: Path, data: bytes) -> None:
    with _replacing(path) as temporary, open(temporary, "xb") as file:
        file.write(data)


# --- what is done already ----------------------------------------------------------------------------------


@dataclasses.dataclass
class _Shard:
    """A file; its size and hash are known once it is whole.

    Attributes:
        file: its name.
        examples: in it.
        bytes: of it.
        encoded: pictures encoded anew.
        most_captions: of an example.
        labels: one more than the highest label; 0: there is none.
        left_out: per reason how many, and the first.
        sha256: of the file, hexadecimal.
    """

    file: str
    examples: int
    bytes: int
    encoded: int
    most_captions: int
    labels: int
    left_out: dict[str, tuple[int, str]]
    sha256: str

    def count(self, record: Record, stored: Record) -> None:
        """Counts an example that is written."""
        self.examples += 1
        self.encoded += record.get("image") is not stored.get("image")
        self.most_captions = max(self.most_captions, len(_captions(record)))
        self.labels = max(self.labels, record.get("label", _NO_LABEL) + 1)


class _Manifest:
    """What a split's files are made of, and which of them are whole; stored in ``SPLIT.manifest.json``.

    It holds nothing of time or place but the path first given, so that an interrupted run ends with the same bytes.
    """

    def __init__(self, path: Path, head: dict[str, Any], shards: dict[int, _Shard]) -> None:
        self._path, self.head, self.shards = path, head, shards

    @property
    def split(self) -> str:
        """Its name."""
        return str(self.head["options"]["split"])

    @property
    def number_of_shards(self) -> int:
        """Known from the start: the files are of fixed ranges of the source."""
        return -(-self.head["examples"] // self.head["options"]["shard_examples"])

    def file(self, number: int) -> str:
        """Name of a file; as TensorFlow Datasets pads its numbers."""
        digits = max(len(str(self.number_of_shards)), 5)
        return f"{self.split}.array_record-{number:0{digits}d}-of-{self.number_of_shards:0{digits}d}"

    @classmethod
    def open(cls, job: Job, source: Source, output: Path) -> _Manifest:
        """The one that is there, or a new one.

        Raises:
            UserError: the one there is of other options or another source, or there are files without one.
        """
        head = {
            "version": _VERSION,
            "source": job.source,
            "path": job.path,
            "fingerprint": source.fingerprint,
            "examples": len(source),
            "modalities": list(source.modalities),
            "classes": list(source.classes),
            "options": job.options(),
        }
        path = output / f"{job.split}{MANIFEST}"
        if path.exists():
            manifest = cls.load(path)
            manifest._refuse_differences(head)
        else:
            manifest = cls(path, head, {})
            prefix = f"{job.split}.array_record-"
            foreign = sorted(name for name in os.listdir(output) if name.startswith(prefix))
            if foreign:
                raise UserError(f"output={job.output!r} has {foreign[0]} already, which no {path.name} tells of")
        for other in _manifests(output):
            manifest._refuse_other_kind(other)
        manifest.save()
        return manifest

    @classmethod
    def load(cls, path: Path) -> _Manifest:
        """Reads one.

        Raises:
            UserError: it is none.
        """
        try:
            head = json.loads(path.read_bytes())
            shards = {
                int(number): _Shard(**shard | {"left_out": {k: tuple(v) for k, v in shard["left_out"].items()}})
                for number, shard in head.pop("shards").items()
            }
            manifest = cls(path, head, shards)
            assert manifest.number_of_shards > 0 and manifest.split and head["version"] == _VERSION
            # It may have come with somebody's data: no name in it leads out of the folder.
            own = all(shard.file == manifest.file(number) for number, shard in shards.items())
            if not own or path.name != f"{manifest.split}{MANIFEST}":
                raise ValueError("names of other files")
        except (ValueError, KeyError, TypeError, AttributeError, AssertionError, ZeroDivisionError) as error:
            raise UserError(f"{path} is no manifest of this program's; remove it and the files it tells of") from error
        return manifest

    def save(self) -> None:
        """Writes it in one move."""
        shards = {str(number): dataclasses.asdict(self.shards[number]) for number in sorted(self.shards)}
        text = json.dumps(self.head | {"shards": shards}, indent=1)
        _write_atomically(self._path, f"{text}\n".encode())

    def finish(self, number: int, shard: _Shard) -> None:
        """Adds a file that is whole."""
        self.shards[number] = shard
        self.save()

    def unfinished(self, verify: bool) -> list[int]:
        """Numbers of the files to write; those that are gone or have changed are to be written again."""
        for number, shard in list(self.shards.items()):
            path = self._path.with_name(shard.file)
            problem = ""
            if not path.is_file():
                problem = "is gone"
            elif path.stat().st_size != shard.bytes:
                problem = f"has {path.stat().st_size} bytes instead of {shard.bytes}"
            elif verify and _sha256(path) != shard.sha256:
                problem = "has changed"
            if problem:
                console.log.warning("prepare: %s %s: written again", shard.file, problem)
                del self.shards[number]
        return [number for number in range(self.number_of_shards) if number not in self.shards]

    def summary(self, reused: int, source: IndexReport | None) -> Summary:
        """The sum of all files."""
        shards, tally = [self.shards[number] for number in sorted(self.shards)], Tally()
        for shard in shards:
            tally.merge(shard.left_out)
        report = tally.report(len(shards), sum(shard.examples for shard in shards))
        return Summary(report, source, sum(s.encoded for s in shards), sum(s.bytes for s in shards), reused)

    def _refuse_differences(self, head: dict[str, Any]) -> None:
        new = {"caption_per_line": False, "max_bytes": MAX_BYTES}  # what a manifest without these options was made with
        before, now = (new | of["options"] | {"source": of["source"]} for of in (self.head, head))
        other = [f"{name}={before.get(name)!r} (now {now[name]!r})" for name in now if before.get(name) != now[name]]
        if not other and self.head["examples"] != head["examples"]:
            other = [f"{self.head['examples']} examples in the source (now {head['examples']}: it has changed)"]
        if not other and self.head["fingerprint"] != head["fingerprint"]:
            other = [f"a source of fingerprint {self.head['fingerprint']} (now {head['fingerprint']}: it has changed)"]
        if other:
            raise UserError(
                f"output={str(self._path.parent)!r}: its split {self.split!r} was begun with {', '.join(other)}; "
                "give the same again, or another output"
            )

    def _refuse_other_kind(self, other: _Manifest) -> None:
        """Splits of one data set of TensorFlow Datasets must have the same features."""
        if "tfds" not in (self.head["options"]["format"], other.head["options"]["format"]):
            return
        for what in ("format", "modalities"):
            mine, its = ((manifest.head | manifest.head["options"])[what] for manifest in (self, other))
            if mine != its:
                raise UserError(
                    f"output={str(self._path.parent)!r}: its split {other.split!r} has {what} {its}, not {mine}; "
                    "the splits of a data set of TensorFlow Datasets are alike"
                )


def _manifests(output: Path) -> list[_Manifest]:
    return [_Manifest.load(path) for path in sorted(output.glob(f"*{MANIFEST}")) if not path.name.startswith(".")]


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- writing -----------------------------------------------------------------------------------------------


class _Stop(Exception):
    """Another worker failed, or the user interrupted."""


def _write_shards(job: Job, source: Source, manifest: _Manifest, todo: list[int]) -> None:
    """Writes files, several at a time; lists each in the manifest when it is whole."""
    starts = {number: number * job.shard_examples for number in todo}
    ranges = {number: range(start, min(start + job.shard_examples, len(source))) for number, start in starts.items()}
    progress = Progress(sum(map(len, ranges.values())))
    stop = threading.Event()
    with ThreadPoolExecutor(job.workers or len(os.sched_getaffinity(0))) as pool:
        running: dict[Future[_Shard], int] = {}
        for number in todo:
            path = local(job.output, "--output") / manifest.file(number)
            running[pool.submit(_write_shard, job, source, path, ranges[number], stop, progress)] = number
        try:
            while running:
                done, _ = wait(running, progress.interval, FIRST_COMPLETED)
                for future in done:
                    manifest.finish(running.pop(future), future.result())
                progress.show()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
            progress.close()
            for future, number in running.items():  # whole when another failed: the next start goes on from them
                if not future.cancelled() and future.exception() is None:
                    manifest.finish(number, future.result())


def _write_shard(
    job: Job, source: Source, path: Path, examples: range, stop: threading.Event, progress: Progress
) -> _Shard:
    """Writes a file under a temporary name, then gives it its own.

    Raises:
        UserError: the source cannot be read.
        OSError: the file cannot be written.
        _Stop: `stop` is set.
    """
    shard, tally = _Shard(path.name, 0, 0, 0, 0, 0, {}, ""), Tally()
    with _replacing(path) as temporary:
        with _array_record(temporary) as write:
            for number, record in zip(examples, _read(job, source, examples), strict=True):
                if stop.is_set():
                    raise _Stop
                try:
                    stored = _stored(record, source.modalities, job)
                except images.Unusable as error:
                    tally.add(str(error), f"example {number}")
                    progress.add(left_out=1)
                    continue
                write(_example(stored, job.format == "tfds"))
                shard.count(record, stored)
                progress.add(left_out=0)
        shard.bytes, shard.left_out, shard.sha256 = temporary.stat().st_size, tally.skipped, _sha256(temporary)
    return shard


def _read(job: Job, source: Source, examples: range) -> Iterator[Record]:
    """The records, read a block at a time."""
    for start in range(examples.start, examples.stop, _BLOCK):
        indices = np.arange(start, min(start + _BLOCK, examples.stop), dtype=np.int64)
        try:
            records = source.read(indices)
        except OSError as error:
            raise UserError(f"path={job.path!r} cannot be read: {error}") from error
        yield from records


@contextlib.contextmanager
def _array_record(path: Path) -> Iterator[Callable[[bytes], None]]:
    """A function that appends a record to a new file.

    Raises:
        OSError: it cannot be written, in the words of the system.
    """
    with _reasons():
        writer = array_record_module.ArrayRecordWriter(str(path), _WRITER_OPTIONS)
    try:
        yield _reasons()(writer.write)
    except BaseException:
        with contextlib.suppress(RuntimeError):
            writer.close()
        raise
    with _reasons():
        writer.close()


@contextlib.contextmanager
def _reasons() -> Iterator[None]:
    """The library's errors, as `write() failed: No space left on device; writing /a/b; at byte 0; ...`."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(str(error).partition("failed: ")[2].partition(";")[0] or str(error)) from error


def _stored(record: Record, modalities: tuple[str, ...], job: Job) -> Record:
    """The record as it is written.

    Raises:
        images.Unusable: the source says so, its picture does not decode, or it has no caption where there are captions.
    """
    if "unusable" in record:
        raise images.Unusable(record["unusable"])
    stored = record.copy()
    if "image" in record:
        stored["image"] = picture(record["image"], job)
    if "text" in modalities and "caption" not in record:
        raise images.Unusable(images.NO_CAPTION)
    return stored


def _captions(record: Record) -> tuple[bytes, ...]:
    return record.get("captions") or ((record["caption"],) if "caption" in record else ())


def _example(record: Record, always_label: bool) -> bytes:
    """A `tf.train.Example`, serialized."""
    import tensorflow as tf

    example = tf.train.Example()
    features = example.features.feature
    if "image" in record:
        features["image"].bytes_list.value.append(record["image"])
    if "caption" in record:
        features["caption"].bytes_list.value.extend(_captions(record))
    if "label" in record or always_label:
        features["label"].int64_list.value.append(record.get("label", _NO_LABEL))
    return bytes(example.SerializeToString(deterministic=True))


# --- pictures ----------------------------------------------------------------------------------------------


def picture(encoded: bytes, job: Job) -> bytes:
    """The picture as it is stored: as it came, or shrunk and encoded anew.

    Args:
        encoded: the file's bytes.
        job: `short_side`, `quality`, `format` and `check`.

    Raises:
        images.Unusable: it does not decode, and `check` is set.
    """
    try:
        with images.decoding():
            size = images.size_of(encoded)
            too_large = 0 < job.short_side < min(size)
            if too_large or (job.format == "tfds" and not _plain(encoded)):
                return _encoded_anew(encoded, job.short_side if too_large else min(size), job.quality)
        if job.check:
            images.load(encoded, _PROBE)
    except images.Unusable:
        if job.check:
            raise
    return encoded


def _plain(encoded: bytes) -> bool:
    """Whether TensorFlow Datasets decodes it as everyone would: a JPEG or PNG, grey or RGB of eight bits."""
    image = images.open_picture(encoded)
    return image.format in ("JPEG", "MPO", "PNG") and image.mode in ("L", "RGB") and "transparency" not in image.info


def _encoded_anew(encoded: bytes, short_side: int, quality: int) -> bytes:
    """The upright picture with this short side, white where it was transparent: a JPEG, or a PNG of a lossless one."""
    image = images.open_picture(encoded)
    turn, stored = images.turn_of(image), image.size
    factor = short_side / min(stored)
    width, height = (max(round(side * factor), short_side) for side in stored)
    if max(width, height) > _MAX_JPEG_SIDE:
        return encoded
    images.load_reduced(image, int(1 / (factor * images.DETAIL)))
    shrunk = images.eight_bit(image)
    if shrunk.size != (width, height):
        shrunk = shrunk.resize((width, height), Image.Resampling.BICUBIC)
    if turn in images.TURNS:
        shrunk = shrunk.transpose(images.TURNS[turn])
    shown = shrunk if shrunk.mode == "L" else images.on_white(shrunk)
    data = io.BytesIO()
    if (width, height) == stored and image.format in ("PNG", "GIF", "BMP"):
        shown.save(data, "PNG")  # nothing is lost so far
    else:
        shown.save(data, "JPEG", quality=quality)
    return data.getvalue()


# --- TensorFlow Datasets -----------------------------------------------------------------------------------


def _write_tfds_metadata(output: Path) -> None:
    """Writes the files by which TensorFlow Datasets knows the splits that are whole.

    The library writes its files in a folder aside, where the data have empty stand-ins (it looks at their names
    only); each is then moved in whole. Two processes that finish at once wait for each other, or one would not know
    the other's split.
    """
    folder = os.open(output, os.O_RDONLY)
    aside = output / ".metadata.tmp"
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(folder, fcntl.LOCK_EX)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        _write_metadata_of([m for m in _manifests(output) if len(m.shards) == m.number_of_shards], output, aside)
        for name in _TFDS_FILES:
            if (aside / name).exists():
                (aside / name).replace(output / name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        os.close(folder)


def _write_metadata_of(whole: list[_Manifest], output: Path, aside: Path) -> None:
    import tensorflow_datasets as tfds

    versioned = re.fullmatch(r"\d+\.\d+\.\d+", output.name)  # as TensorFlow Datasets lays out NAME/VERSION
    name = re.sub(r"\W+", "_", (output.parent if versioned else output).name, flags=re.ASCII).lower()
    template = tfds.core.ShardedFileTemplate(
        data_dir=aside,
        template="{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        dataset_name=name if name[:1].isalpha() else "data",
    )
    splits = []
    for manifest in whole:
        shards = [manifest.shards[number] for number in range(manifest.number_of_shards)]
        for shard in shards:
            (aside / shard.file).touch()
        splits.append(
            tfds.core.SplitInfo(
                name=manifest.split,
                shard_lengths=[shard.examples for shard in shards],
                num_bytes=sum(shard.bytes for shard in shards),
                filename_template=template.replace(split=manifest.split, filetype_suffix="array_record"),
            )
        )
    tfds.folder_dataset.write_metadata(
        data_dir=aside,
        features=_tfds_features(whole),
        split_infos=splits,
        version=output.name if versioned else "1.0.0",
        filename_template=template,
        check_data=False,  # it would use tf.data, which does not read ArrayRecord
        description="Written by m3ae_jax.data.prepare.",
        disable_shuffling=True,  # the records keep the source's order
    )


def _tfds_features(whole: list[_Manifest]) -> dict[str, Any]:
    import tensorflow_datasets as tfds

    shards = [shard for manifest in whole for shard in manifest.shards.values()]
    classes: list[str] = next((m.head["classes"] for m in whole if m.head["classes"]), [])
    features: dict[str, Any] = {}
    if "image" in whole[0].head["modalities"]:
        features["image"] = tfds.features.Image(shape=(None, None, 3))  # no encoding_format: JPEG and PNG both
    if "text" in whole[0].head["modalities"]:
        several = any(shard.most_captions > 1 for shard in shards)
        features["caption"] = tfds.features.Sequence(tfds.features.Text()) if several else tfds.features.Text()
    if any(shard.labels for shard in shards):
        number = max(shard.labels for shard in shards)
        names = {"names": [" ".join(name.split()) for name in classes]} if classes else {"num_classes": number}
        features["label"] = tfds.features.ClassLabel(**names)
    return features


# --- the command -------------------------------------------------------------------------------------------


class Progress:
    """A line on standard error: redrawn at most every 2 s on a terminal, else one every 30 s.

    Args:
        total: examples to come.
        clock: seconds.
    """

    def __init__(self, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._total, self._clock = total, clock
        self._terminal = sys.stderr.isatty()
        self.interval = _TERMINAL_SECONDS if self._terminal else _LOG_SECONDS
        self._began = self._shown = clock()
        self._lock = threading.Lock()
        self._done = self._left_out = self._width = 0

    def add(self, left_out: int) -> None:
        """Counts one example, written or left out."""
        with self._lock:
            self._done += 1
            self._left_out += left_out

    def show(self) -> None:
        """Prints the line if it is time to."""
        now = self._clock()
        if now - self._shown < self.interval:
            return
        self._shown = now
        line = self.line()
        self._width, blanks = len(line), max(self._width - len(line), 0)
        end = " " * blanks if self._terminal else "\n"
        print(f"{chr(13) * self._terminal}{line}", end=end, file=sys.stderr, flush=True)

    def line(self) -> str:
        """As ``prepare: 2,000 of 10,000 examples (20 %), 500/s, 16s to go, left out 3``."""
        rate = self._done / max(self._clock() - self._began, 1e-9)
        to_go = console.duration((self._total - self._done) / rate) if rate else "?"
        share = 100 * self._done // max(self._total, 1)
        done = f"{self._done:,} of {self._total:,} examples ({share} %)"
        return f"prepare: {done}, {rate:,.0f}/s, {to_go} to go, left out {self._left_out:,}"

    def close(self) -> None:
        """Clears a terminal's line."""
        if self._terminal and self._width:
            print(f"\r{' ' * self._width}\r", end="", file=sys.stderr, flush=True)


def _summary_lines(job: Job, summary: Summary) -> str:
    report, source = summary.report, summary.source
    there = f", {summary.reused} of them there already" if summary.reused else ""
    rows: list[tuple[str, object]] = [
        ("examples", f"{report.examples:,} ({summary.encoded:,} pictures encoded anew)"),
        ("left out", skip_line(report) or "none"),
        *([("left out by the source", skip_line(source) or "none")] if source else []),
        *([("not read", unused_line(source))] if source and source.unused else []),
        ("files", f"{report.shards:,}, {summary.bytes:,} bytes{there}"),
    ]
    return f"{Path(job.output) / job.split}.array_record\n{console.table(rows)}"


def _define_flags() -> None:
    # Not at import: a program that imports `prepare` may have a flag of the same name.
    flags.DEFINE_string("source", None, f"The format: {', '.join(SOURCES)}, or package.module:Class.", required=True)
    flags.DEFINE_string("path", "", "The source's files, as in a config.")
    flags.DEFINE_string("output", None, "The folder to write.", required=True)
    flags.DEFINE_string("format", "array_record", f"{' or '.join(FORMATS)}.")
    flags.DEFINE_string("split", "train", "Of sources with several; names the files too.")
    flags.DEFINE_string("name", "", "Names the files, where they are not to be called as the split.")
    flags.DEFINE_string("image_key", "", "Name of the picture field; empty: the usual names.")
    flags.DEFINE_string("caption_key", "", "Name of the caption field; empty: the usual names.")
    flags.DEFINE_string("label_key", "", "Name of the class field; empty: the usual names.")
    flags.DEFINE_string("captions", "draw", "Of pictures with several: draw keeps them together, all: an example each.")
    flags.DEFINE_string("template", "", "Makes a caption of a class name, as 'a photo of a {}'.")
    flags.DEFINE_bool("caption_per_line", False, "Each line of a .txt is a caption of its own.")
    flags.DEFINE_integer("max_bytes", MAX_BYTES, "Of one picture, caption or record; a larger one is left out.")
    flags.DEFINE_string("index_dir", "", "Folder of the source's index files; empty: in the user's cache.")
    flags.DEFINE_integer("short_side", 256, "Shrink pictures to this, pixels; 0: leave them.")
    flags.DEFINE_integer("quality", 95, "Of the JPEGs that are made, 1 to 100.")
    flags.DEFINE_integer("shard_examples", 10_000, "Examples of the source a file.")
    flags.DEFINE_integer("workers", 0, "Files written at a time; 0: one a core.")
    flags.DEFINE_bool("check", True, "Leave out pictures that do not decode.")
    flags.DEFINE_bool("verify", False, "On going on, compare the hashes of the files that are there.")


def _job(args: Any) -> Job:
    """What the flags say; a mistake is reported before the seconds that TensorFlow takes to start."""
    read = {field.name: args[field.name].value for field in dataclasses.fields(SourceOptions) if field.name in args}
    own = {field.name: args[field.name].value for field in dataclasses.fields(Job) if field.name != "read"}
    job = Job(read=SourceOptions(**read), **own)
    _check(job)
    return job


def _main(argv: list[str]) -> None:
    console.start_logging()
    try:
        job = _job(flags.FLAGS)
        console.import_tensorflow()
        summary = prepare(job)
    except KeyboardInterrupt:
        print("prepare: interrupted; the same command goes on", file=sys.stderr)
        raise SystemExit(STOPPED) from None
    except OSError as error:
        raise UserError(str(error)) from None
    print(_summary_lines(job, summary))


if __name__ == "__main__":
    console.quiet_environment()
    _define_flags()
    command_line.run(_main)
