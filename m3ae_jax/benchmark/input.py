"""The input pipeline: examples per second, and what each stage costs a core."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

import m3ae_jax.data.images as images
from m3ae_jax.benchmark.timing import Figures, cores, timed
from m3ae_jax.data.mixture import open_mixture
from m3ae_jax.data.order import RandomStream
from m3ae_jax.data.pipeline import Batches, Feed, masked, train_view
from m3ae_jax.data.sources.base import Record, Source
from m3ae_jax.data.sources.webdataset import WebDatasetSource
from m3ae_jax.data.text import Tokenizer, encode_batch, load_tokenizer
from m3ae_jax.data.tokens import Group, restricted
from m3ae_jax.errors import UserError
from m3ae_jax.objectives.base import build

_PICTURES = 2000
_SIDE, _QUALITY = 256, 90
_WORDS = 19
_CAPTIONS_VOCABULARY = 4000
_BATCH = 64
_SAMPLE = 256  # examples of a stage
_SECONDS = 5.0  # of a repetition of the whole, at least


@dataclasses.dataclass(frozen=True)
class InputFigures(Figures):
    """What was measured.

    Attributes:
        data: what was read, in words.
        cores: that the process may use.
        rates: examples per second of the whole pipeline, one a repetition.
        stages: ``{stage: seconds an example}`` on one core.
    """

    data: str
    cores: int
    rates: list[float]
    stages: dict[str, float]

    @property
    def rate(self) -> float:
        """The median."""
        return statistics.median(self.rates)

    def text(self) -> str:
        """For people."""
        total = sum(self.stages.values())
        rows = [
            f"  {name:38} {seconds * 1e3:7.3f} ms {seconds / total:5.0%} {1 / seconds:10,.0f} a second and core"
            for name, seconds in self.stages.items()
        ]
        bound = max(self.stages, key=self.stages.__getitem__)
        lines = [
            f"input pipeline, {self.data}, {self.cores} cores:",
            f"  {self.rate:,.0f} examples a second ({min(self.rates):,.0f} to {max(self.rates):,.0f}), "
            f"{self.rate / self.cores:,.0f} a core; bound by: {bound}",
            "each stage alone, on one core:",
            *rows,
            f"  {'sum':38} {total * 1e3:7.3f} ms      {1 / total:10,.0f} a second and core",
        ]
        return "\n".join(lines)


def measure(config: ConfigDict, *, own_data: bool = False, repeats: int = 3) -> InputFigures:
    """Measures the pipeline of a resolved config, its sizes and modalities.

    Args:
        config: resolved.
        own_data: read its data; else 2,000 JPEGs of 256 pixels and 19 words each, made here, in a tar.
        repeats: measurements of the whole.
    """
    with tempfile.TemporaryDirectory() as folder:
        if own_data:
            data = open_mixture(config, 1)
            feed, source = data.feed(data.parts[0], config), data.members[data.parts[0].members[0]].source
            what = f"{config.data.train.source} {config.data.train.path}"
        else:
            source, size = _made(Path(folder))
            tokenizer = _trained(source, Path(folder))
            feed = Feed((source,), (train_view(config, source),))
            what = f"{_PICTURES} JPEGs of {_SIDE} px and {size / 1e3:.1f} kB"
        if own_data or config.data.tokenizer:
            tokenizer = load_tokenizer(config.data.tokenizer or "scenes")
        groups = restricted(build(config, tokenizer.vocab_size).groups, source.modalities)
        if not groups:
            raise UserError("the data hold none of data.modalities")
        stages = _stages(config, source, tokenizer, groups)
        rates = [_rate(config, feed, tokenizer, groups) for _ in range(repeats)]
    what += f", to {config.data.image_size} px and at most {config.data.max_text_tokens} tokens"
    return InputFigures(what, cores(), rates, stages)


def _rate(config: ConfigDict, feed: Feed, tokenizer: Tokenizer, groups: tuple[Group, ...]) -> float:
    batches = Batches(config, groups, feed, tokenizer, batch_size=_BATCH)
    with contextlib.closing(iter(batches)) as iterator:
        for _ in range(4):  # fills what is read ahead
            next(iterator)
        begin, count = time.perf_counter(), 0
        while (seconds := time.perf_counter() - begin) < _SECONDS or count < 3:
            next(iterator)
            count += 1
    return count * _BATCH / seconds


def _stages(config: ConfigDict, source: Source, tokenizer: Tokenizer, groups: tuple[Group, ...]) -> dict[str, float]:
    """Seconds an example of each stage, alone on one core: the least of three rounds."""
    indices = np.arange(_SAMPLE) % len(source)
    records = source.read(indices)
    data = config.data
    seconds: dict[str, float] = {}

    def clock(name: str, work: Callable[[], object], examples: int) -> None:
        rounds: list[float] = []
        for _ in range(3):
            with timed(rounds, time.process_time):
                work()
        seconds[name] = max(min(rounds) / examples, 1e-9)

    modalities = {m.name: m for group in groups for m in group.modalities}
    uniform = [RandomStream(1, i).take(8) for i in range(len(records))]
    clock("read", lambda: [source.read(indices[i : i + 8]) for i in range(0, len(indices), 8)], len(indices))
    noise = 8 + sum(m.tokens for m in modalities.values())
    clock("draw", lambda: [RandomStream(1, i).take(noise) for i in range(len(records))], len(records))
    tokens: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    if "image" in modalities:
        whole = [record for record in records if _size(record)]
        crops = [images.Crop(uniform[i][:5], tuple(data.crop_scale)) for i in range(len(whole))]
        clock("decode", lambda: [images.open_picture(r["image"]).load() for r in whole], len(whole))

        def load() -> list[np.ndarray]:
            return [images.load(r["image"], data.image_size, c) for r, c in zip(whole, crops, strict=True)]

        pictures = load()
        clock("crop and resize", load, len(whole))
        seconds["crop and resize"] = max(seconds["crop and resize"] - seconds["decode"], 1e-9)
        clock("patch", lambda: [images.patchify(p[None], data.patch_size) for p in pictures], len(whole))
        patches = images.patchify(np.stack(pictures[:_BATCH]), data.patch_size)
        tokens["image"] = patches, np.ones(patches.shape[:2], bool)
    if "text" in modalities:
        captions = [record.get("caption", b"") for record in records]
        chunks = [captions[i : i + 8] for i in range(0, len(captions), 8)]
        clock("tokenize", lambda: [encode_batch(tokenizer, c, data.max_text_tokens) for c in chunks], len(records))
        ids, length = encode_batch(tokenizer, captions[:_BATCH], data.max_text_tokens)
        tokens["text"] = ids, np.arange(data.max_text_tokens) < length[:, None]
    size = min(len(value) for value, _ in tokens.values())
    tokens = {name: (value[:size], real[:size]) for name, (value, real) in tokens.items()}

    def mask() -> None:
        for group in groups:
            masked(group, [RandomStream(1, i) for i in range(size)], tokens)

    clock("mask", mask, size)
    return seconds


def _trained(source: Source, folder: Path) -> Tokenizer:
    from m3ae_jax.data.train_tokenizer import read_captions, train

    path = str(folder / "made.model")
    train(read_captions(source, _PICTURES), path, 8000)
    return load_tokenizer(path)


def _size(record: Record) -> tuple[int, int] | None:
    try:
        return images.size_of(record.get("image", b""))
    except images.Unusable:
        return None


def _made(folder: Path) -> tuple[WebDatasetSource, float]:
    """Pictures of soft colours and grain, about as large as photographs, and captions of common words."""
    rng = np.random.default_rng(0)
    letters = [rng.integers(ord("a"), ord("z") + 1, rng.integers(2, 9)) for _ in range(_CAPTIONS_VOCABULARY)]
    words = ["".join(map(chr, word)) for word in letters]
    total = 0
    with tarfile.open(folder / "made.tar", "w") as tar:
        for number in range(_PICTURES):
            soft = Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8)).resize((_SIDE, _SIDE))
            grain = np.asarray(soft) + rng.normal(0, 3.5, (_SIDE, _SIDE, 3))
            file = io.BytesIO()
            Image.fromarray(np.clip(grain, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=_QUALITY)
            total += len(file.getvalue())
            caption = " ".join(words[i] for i in rng.integers(0, len(words), _WORDS))
            for extension, data in (("jpg", file.getvalue()), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{number:05d}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return WebDatasetSource(str(folder)), total / _PICTURES
