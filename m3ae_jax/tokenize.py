r"""Ids of pictures on disk: a source through a visual tokenizer, for chosen crops, as files beside each other.

    python -m m3ae_jax.tokenize --workdir=runs/tokenizer --source=webdataset --path=SHARDS --output=DIR \
        [--crops=4 --crop_scale=0.5,1.0 --flip] [--shard=0/8]

``DIR/ids-00000-of-00012.npz`` and so on hold a fixed range of the source each, in its order: ``ids``
`[n, crops, h, w]`, ``box`` `[n, crops, 4]` (left, top, width and height of the crop in pixels of the upright picture),
``mirrored`` `[n, crops]`, ``first`` (the number of the first example) and ``usable`` `[n]`; of a picture that cannot be
read ids are 0.
Crops are a function of `--seed` and the example's number, so the same command gives the same bytes with any number of
jobs; started again it writes what is missing. ``DIR/ids.json`` says of which tokenizer, source and options they are; a
folder of others is refused.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import m3ae_jax.console as console

console.quiet_environment()

import numpy as np  # noqa: E402
from absl import flags  # noqa: E402

import m3ae_jax.command_line as command_line  # noqa: E402
import m3ae_jax.data.images as images  # noqa: E402
from m3ae_jax.atomic import replacing, write_text  # noqa: E402
from m3ae_jax.config.schema import source_fields  # noqa: E402
from m3ae_jax.data.order import RandomStream, fold_seed  # noqa: E402
from m3ae_jax.data.sources import NAMES, open_source  # noqa: E402
from m3ae_jax.data.sources.base import Record, Source, name_of, report_of  # noqa: E402
from m3ae_jax.data.sources.index import Tally, left_out, skip_line  # noqa: E402
from m3ae_jax.data.tokens import patch_grid  # noqa: E402
from m3ae_jax.errors import UserError  # noqa: E402
from m3ae_jax.paths import local  # noqa: E402

if TYPE_CHECKING:
    from m3ae_jax.inference import VisualTokenizer

MANIFEST = "ids.json"
_BATCH = 64  # examples
_VERSION = 1
_ENDLESS = 2**30  # examples; of drawn pictures there are more


@dataclasses.dataclass(frozen=True)
class Crops:
    """Which parts of a picture get ids.

    Attributes:
        number: of random crops a picture; 0: the centred square, once.
        scale: least and largest share of the area.
        ratio: least and largest width / height.
        flip: mirror half of them.
        seed: of the draws.
    """

    number: int = 0
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = False
    seed: int = 0

    def of(self, example: int) -> list[images.Crop]:
        """Those of an example."""
        if not self.number:
            return [images.Crop()]
        first, others = fold_seed(self.seed, "tokenize"), fold_seed(self.seed, "tokenize", "trials")
        draws = range(example * self.number, (example + 1) * self.number)
        return [
            images.Crop(
                RandomStream(first, draw).take(5),
                self.scale,
                self.ratio,
                self.flip,
                functools.partial(RandomStream, others, draw),
            )
            for draw in draws
        ]


@dataclasses.dataclass(frozen=True)
class Job:
    """What gets ids, and where they go.

    Attributes:
        model: that gives them.
        source: of the pictures.
        output: the folder; it is made.
        crops: see there.
        shard_examples: examples a file.
        shard: this job's number and how many jobs there are; it writes every so-many-th file.
        most: of the source's examples only so many, the first; 0: all.
    """

    model: VisualTokenizer
    source: Source
    output: Path
    crops: Crops = Crops()
    shard_examples: int = 10_000
    shard: tuple[int, int] = (0, 1)
    most: int = 0

    @property
    def examples(self) -> int:
        """How many get ids, of all jobs."""
        return min(len(self.source), self.most or len(self.source))

    def files(self) -> list[Path]:
        """All files, those of other jobs too."""
        count = max(-(-self.examples // self.shard_examples), 1)
        return [self.output / f"ids-{number:05d}-of-{count:05d}.npz" for number in range(count)]

    def run(self) -> Tally:
        """Writes the files of this job that are missing.

        Returns:
            What could not be used of them, by reason.

        Raises:
            UserError: the folder holds other ids, the data cannot be read, or the folder cannot be written.
        """
        tally, began = Tally(""), time.monotonic()
        try:
            self._claim()
            files = self.files()
            mine = list(range(self.shard[0], len(files), self.shard[1]))
            missing = [number for number in mine if not _is_whole(files[number])]
            if len(missing) < len(mine):
                console.log.info("%d of %d files are there already", len(mine) - len(missing), len(mine))
            for done, number in enumerate(missing, 1):
                self._write(files[number], number * self.shard_examples, tally)
                rate = min(done * self.shard_examples, self.examples) / (time.monotonic() - began)
                console.log.info("  %s: %d of %d (%.0f examples/s)", files[number].name, done, len(missing), rate)
        except OSError as error:
            raise UserError(f"--output={str(self.output)!r}: {error.strerror or error}") from None
        return tally

    def about(self) -> dict[str, Any]:
        """What the ids are of; stored beside them."""
        data = self.model.config.data
        return {
            "version": _VERSION,
            "tokenizer": fingerprint(self.model),
            "codes": self.model.codes,
            "grid": list(patch_grid(self.model.config)),
            "image_size": data.image_size,
            "patch_size": data.patch_size,
            "source": self.source.fingerprint,
            "examples": self.examples,
            "shard_examples": self.shard_examples,
            **{f"crops_{name}": value for name, value in dataclasses.asdict(self.crops).items()},
        }

    def _claim(self) -> None:
        """Writes what the folder is of, or refuses one of something else."""
        path, ours = self.output / MANIFEST, json.loads(json.dumps(self.about()))
        try:
            theirs = json.loads(path.read_bytes())
        except FileNotFoundError:
            self.output.mkdir(parents=True, exist_ok=True)
            if others := sorted(self.output.glob("ids-*.npz")):
                raise UserError(f"{self.output} has {others[0].name} and no {MANIFEST}: name another folder") from None
            write_text(path, json.dumps(ours, indent=2) + "\n")
            return
        except ValueError:
            raise UserError(f"{path} is damaged: remove it, or name another folder") from None
        theirs = theirs if isinstance(theirs, dict) else {}
        differs = [
            f"{name} {theirs.get(name)!r}, here {value!r}" for name, value in ours.items() if theirs.get(name) != value
        ]
        if differs:
            raise UserError(f"{self.output} holds ids of something else: {'; '.join(differs)}; name another folder")

    def _write(self, path: Path, first: int, tally: Tally) -> None:
        stop, data = min(first + self.shard_examples, self.examples), self.model.config.data
        many, parts = max(self.crops.number, 1), []
        with ThreadPoolExecutor() as decoders:
            for start in range(first, stop, _BATCH):
                indices = np.arange(start, min(start + _BATCH, stop))
                examples = list(decoders.map(self._example, self.source.read(indices), indices.tolist()))
                for index, example in zip(indices.tolist(), examples, strict=True):
                    if "unusable" in example:
                        tally.add(example["unusable"], name_of(self.source, index))
                size = data.image_size
                pictures = [x for e in examples for x in e.get("pictures", np.zeros((many, size, size, 3), np.uint8))]
                ids = self.model.encode(np.stack(pictures))
                usable = np.array(["unusable" not in example for example in examples])
                ids = ids.reshape(len(examples), many, *ids.shape[1:]) * usable[:, None, None, None]
                nothing = {"box": np.zeros((many, 4), np.float32), "mirrored": np.zeros(many, bool)}
                of = {name: np.stack([e.get(name, empty) for e in examples]) for name, empty in nothing.items()}
                parts.append({"ids": ids, "usable": usable, **of})
        kind = np.uint16 if self.model.codes <= 2**16 else np.int32
        arrays: dict[str, Any] = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        arrays |= {"ids": arrays["ids"].astype(kind), "first": np.int64(first)}
        with replacing(path) as fresh, fresh.open("wb") as file:
            np.savez_compressed(file, **arrays)

    def _example(self, record: Record, index: int) -> dict[str, Any]:
        data, crops = self.model.config.data, self.crops.of(index)
        try:
            if "unusable" in record:
                raise images.Unusable(record["unusable"])
            size = images.upright_size(record["image"], data.max_pixels)
            return {
                "pictures": [images.load(record["image"], data.image_size, crop, data.max_pixels) for crop in crops],
                "box": np.array([crop.box(*size) for crop in crops], np.float32),
                "mirrored": np.array([crop.mirrored for crop in crops]),
            }
        except images.Unusable as reason:
            return {"unusable": str(reason)}


def fingerprint(model: VisualTokenizer) -> str:
    """16 hexadecimal digits of a tokenizer's numbers."""
    import jax

    digest = hashlib.sha256(repr(model.config[model.config.objective].to_dict()).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.params):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:16]


def _is_whole(path: Path) -> bool:
    """Whether a file is there; what is damaged is made again."""
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except (FileNotFoundError, zipfile.BadZipFile):
        return False


def _define_flags() -> None:
    flags.DEFINE_string("workdir", None, "The tokenizer's run, or one of its checkpoints.", required=True)
    flags.DEFINE_string("source", "folder", f"The data's format: {', '.join(NAMES)}.")
    flags.DEFINE_string("path", "", "The data: by default a folder of pictures.")
    flags.DEFINE_string("output", None, "The folder to write.", required=True)
    flags.DEFINE_string("split", "", "Of formats with named splits.")
    flags.DEFINE_string("image_key", "", "Name of the picture's field; empty: the usual names.")
    flags.DEFINE_integer("crops", 0, "Random crops a picture; 0: the centred square.", lower_bound=0)
    flags.DEFINE_list("crop_scale", ["0.2", "1.0"], "Least and largest share of a picture's area.")
    flags.DEFINE_bool("flip", False, "Mirror half of the crops.")
    flags.DEFINE_integer("seed", 0, "Of the crops.", lower_bound=0)
    flags.DEFINE_integer("shard_examples", 10_000, "Examples a file.", lower_bound=1)
    flags.DEFINE_integer("examples", 0, "Of the source's examples only so many, the first; 0: all.", lower_bound=0)
    flags.DEFINE_string("shard", "0/1", "i/n: this job writes every n-th file, from the i-th on (from 0).")


def parsed_shard(text: str) -> tuple[int, int]:
    """``i/n``.

    Raises:
        UserError: it is no such thing.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not int(match[1]) < int(match[2]):
        raise UserError(f"--shard={text!r} is not i/n with i from 0 to n - 1, as 0/8")
    return int(match[1]), int(match[2])


def _scale(given: list[str]) -> tuple[float, float]:
    try:
        low, high = (float(number) for number in given)
    except ValueError:
        low = high = 0.0
    if not 0 < low <= high <= 1:
        raise UserError(f"--crop_scale={','.join(given)} is not two numbers in (0, 1], the lower one first")
    return low, high


def _main(argv: list[str]) -> None:
    del argv
    import m3ae_jax.inference as inference

    args = flags.FLAGS
    console.start_logging()
    shard, scale, output = parsed_shard(args.shard), _scale(args.crop_scale), local(args.output, "--output")
    model = inference.load(args.workdir)
    if not isinstance(model, inference.VisualTokenizer):
        raise UserError(
            f"--workdir={args.workdir!r} is a run of {model.config.objective!r}, which gives no ids of pictures"
        )
    spec = source_fields()
    spec.update(source=args.source, path=args.path, image_key=args.image_key)
    if args.split:
        spec.split = args.split
    source = open_source(spec, "--", model.config)
    if "image" not in source.modalities:
        raise UserError(f"--path={args.path!r} holds no pictures")
    crops = Crops(args.crops, scale, flip=args.flip, seed=args.seed)
    job = Job(model, source, output, crops, args.shard_examples, shard, args.examples)
    if job.examples > _ENDLESS:
        raise UserError(f"--source={args.source!r} has {len(source):,} pictures: say how many, as --examples=100000")
    report = report_of(source)
    console.log.info("%s pictures%s, by %r", f"{len(source):,}", left_out(report) if report else "", model)
    tally = job.run()
    unusable = f"; unusable: {skip_line(tally.report(1, 0))}" if tally.skipped else ""
    total, (first, jobs) = len(job.files()), shard
    console.log.info("%s: %d of %d files are this job's%s", output, len(range(first, total, jobs)), total, unusable)


if __name__ == "__main__":
    _define_flags()
    command_line.run(_main)
