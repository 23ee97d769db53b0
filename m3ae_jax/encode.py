r"""Features of a folder of pictures, or of any data that can be trained on, into one file.

    python -m m3ae_jax.encode --workdir=runs/tiny --path=PICTURES --output=features.npy
    python -m m3ae_jax.encode --workdir=runs/tiny --source=webdataset --path=SHARDS --output=features.npy \
        --input=both --pooling=mean --normalize

The file is an array `[N, D] float32` for `numpy.load`, row i of example i; beside it ``features.jsonl`` has a line for
each row: its number, its ``name`` (of folders the picture's path), its ``class``, and of what cannot be used why
(``unusable``): such a row is NaN. Memory does not grow with N. Both files appear at the end, whole, or not at all.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import m3ae_jax.console as console

console.quiet_environment()

import numpy as np  # noqa: E402
from absl import flags  # noqa: E402

import m3ae_jax.command_line as command_line  # noqa: E402
import m3ae_jax.data.images as images  # noqa: E402
from m3ae_jax.atomic import replacing  # noqa: E402
from m3ae_jax.config.schema import source_fields  # noqa: E402
from m3ae_jax.data.sources import NAMES, open_source  # noqa: E402
from m3ae_jax.data.sources.base import Record, Source, name_of, report_of  # noqa: E402
from m3ae_jax.data.sources.index import Tally, left_out, skip_line  # noqa: E402
from m3ae_jax.errors import UserError, one_of  # noqa: E402
from m3ae_jax.evals.features import INPUTS  # noqa: E402
from m3ae_jax.paths import local  # noqa: E402

if TYPE_CHECKING:
    from m3ae_jax.inference import Model

_TELL_EVERY = 10.0  # seconds


@dataclasses.dataclass(frozen=True)
class Job:
    """What is encoded, and how.

    Attributes:
        model: that encodes.
        source: of the examples.
        inputs: modalities of each example that it sees.
        pooling: see `Model.encode`.
        normalize: likewise.
        batch_size: examples at a time.
    """

    model: Model
    source: Source
    inputs: tuple[str, ...]
    pooling: str = "cls"
    normalize: bool = False
    batch_size: int = 64

    def rows(self) -> Iterator[tuple[np.ndarray, list[dict[str, Any]]]]:
        """Batches of features, `[b, D] float32`, and what is told of each row; the next is read while one is computed.

        Raises:
            UserError: the data cannot be read.
        """
        self.model.batch_sizes = [self.batch_size]
        starts = range(0, len(self.source), self.batch_size)
        with ThreadPoolExecutor() as decoders, ThreadPoolExecutor(1) as reader:
            ahead = reader.submit(self._read, starts[0], decoders)
            for start in starts:
                examples = ahead.result()
                if start != starts[-1]:
                    ahead = reader.submit(self._read, start + self.batch_size, decoders)
                yield self._encoded(examples), [self._told(start + i, one) for i, one in enumerate(examples)]

    def _read(self, start: int, decoders: ThreadPoolExecutor) -> list[dict[str, Any]]:
        """The examples of a batch, ready for the model; of one that cannot be used the reason, ``unusable``."""
        indices = np.arange(start, min(start + self.batch_size, len(self.source)))
        try:
            records = self.source.read(indices)
        except OSError as error:
            raise UserError(f"the data cannot be read: {error}") from None
        return list(decoders.map(self._example, records))

    def _example(self, record: Record) -> dict[str, Any]:
        data = self.model.config.data
        example: dict[str, Any] = {"label": record.get("label")}
        try:
            if "unusable" in record:
                raise images.Unusable(record["unusable"])
            if "image" in self.inputs:
                example["image"] = images.load(record["image"], data.image_size, max_pixels=data.max_pixels)
            if "text" in self.inputs:
                if "caption" not in record:
                    raise images.Unusable(images.NO_CAPTION)
                example["text"] = record["caption"].decode("utf-8", "replace")
        except images.Unusable as reason:
            example["unusable"] = str(reason)
        return example

    def _encoded(self, examples: list[dict[str, Any]]) -> np.ndarray:
        usable = [i for i, one in enumerate(examples) if "unusable" not in one]
        given = {f"{m}s": [examples[i][m] for i in usable] for m in self.inputs}
        found = self.model.encode(**given, pooling=self.pooling, normalize=self.normalize, tokens=False).pooled
        rows = np.full((len(examples), found.shape[1]), np.nan, np.float32)
        rows[usable] = found
        return rows

    def _told(self, row: int, example: dict[str, Any]) -> dict[str, Any]:
        told: dict[str, Any] = {"row": row, "name": name_of(self.source, row)}
        if example["label"] is not None:
            told["class"] = self.source.classes[example["label"]]
        return told | ({"unusable": example["unusable"]} if "unusable" in example else {})


def check_output(output: Path) -> None:
    """Sees that a file and the ``.jsonl`` beside it can be made here, and that no other's is replaced.

    Raises:
        UserError: it is no ``.npy``, or the ``.jsonl`` there is not of such a file.
    """
    if output.suffix != ".npy" or output.is_dir():
        raise UserError(f"--output={str(output)!r} must be a file that ends in .npy")
    about = output.with_suffix(".jsonl")
    if about.exists() and not output.exists():
        raise UserError(f"--output={str(output)!r} would replace {about}, which is not of features: name another file")


def write(job: Job, output: Path) -> Tally:
    """Encodes all examples of a job's source into a file, and tells of them in a ``.jsonl`` beside it.

    Args:
        job: what is encoded.
        output: ends in ``.npy``; takes the place of a former one at the end.

    Returns:
        What could not be used, by reason.

    Raises:
        UserError: the data cannot be read, nothing of them can be used, or the file cannot be written.
    """
    check_output(output)
    tally, done, began = Tally(""), 0, time.monotonic()
    told_at = began
    total = len(job.source)
    try:
        with (
            replacing(output) as array, array.open("wb") as features,
            replacing(output.with_suffix(".jsonl")) as lines, lines.open("w", encoding="utf-8") as about,
        ):  # fmt: skip
            for batch, told in job.rows():
                if not done:
                    header = {"descr": "<f4", "fortran_order": False, "shape": (total, batch.shape[1])}
                    np.lib.format.write_array_header_1_0(features, header)
                features.write(batch.astype("<f4").tobytes())
                for row in told:
                    about.write(json.dumps(row) + "\n")
                    if "unusable" in row:
                        tally.add(row["unusable"], row["name"])
                done += len(batch)
                if time.monotonic() - told_at > _TELL_EVERY:
                    told_at = time.monotonic()
                    console.log.info("  %s of %s (%.0f/s)", f"{done:,}", f"{total:,}", done / (told_at - began))
            if sum(count for count, _ in tally.skipped.values()) == total:
                raise UserError(f"nothing can be encoded of {total:,} examples{left_out(tally.report(1, 0))}")
    except OSError as error:
        raise UserError(f"--output={str(output)!r} cannot be written: {error.strerror}") from None
    return tally


def _define_flags() -> None:
    flags.DEFINE_string("workdir", None, "The run, or one of its checkpoints.", required=True)
    flags.DEFINE_string("source", "folder", f"The data's format: {', '.join(NAMES)}.")
    flags.DEFINE_string("path", "", "The data: by default a folder of pictures.")
    flags.DEFINE_string("output", None, "The file to write, FILE.npy.", required=True)
    flags.DEFINE_string("input", "", f"{', '.join(INPUTS)}; by default image, or text where there are no pictures.")
    flags.DEFINE_string("pooling", "cls", "cls, or the mean of the patches and words.")
    flags.DEFINE_bool("normalize", False, "Divide each row by its length.")
    flags.DEFINE_integer("batch_size", 64, "Examples at a time.", lower_bound=1)
    flags.DEFINE_string("split", "", "Of formats with named splits.")
    flags.DEFINE_string("image_key", "", "Name of the picture's field; empty: the usual names.")
    flags.DEFINE_string("caption_key", "", "Name of the caption's field; empty: the usual names.")
    flags.DEFINE_string("tokenizer", "", "The tokenizer's file, if neither the run nor its config leads to it.")
    flags.DEFINE_string("objective", "", "The import path that the run's config names, if it names one.")


def _main(argv: list[str]) -> None:
    del argv
    import m3ae_jax.inference as inference

    args = flags.FLAGS
    console.start_logging()
    output = local(args.output, "--output")
    check_output(output)  # before anything that takes long
    model = inference.load(args.workdir, tokenizer=args.tokenizer, objective=args.objective)
    if isinstance(model, inference.VisualTokenizer):
        raise UserError(f"--workdir={args.workdir!r} is a visual tokenizer: it gives ids, no features")
    source = _open(args, model)
    inputs = _inputs(args.input, model, source)
    report = report_of(source)
    beside = left_out(report) if report else ""
    console.log.info("%s of %s examples%s, by %r", " and ".join(inputs), f"{len(source):,}", beside, model)
    tally = write(Job(model, source, inputs, args.pooling, args.normalize, args.batch_size), output)
    unusable = f", some of them NaN: {skip_line(tally.report(1, 0))}" if tally.skipped else ""
    console.log.info("%s: %s rows%s", output, f"{len(source):,}", unusable)
    console.log.info("%s tells of each row", output.with_suffix(".jsonl"))


def _open(args: Any, model: Model) -> Source:
    spec = source_fields()
    spec.update(source=args.source, path=args.path, image_key=args.image_key, caption_key=args.caption_key)
    if args.split:
        spec.split = args.split
    return open_source(spec, "--", model.config)


def _inputs(given: str, model: Model, source: Source) -> tuple[str, ...]:
    """The modalities that are encoded.

    Raises:
        UserError: the model or the data lack one.
    """
    if given and given not in INPUTS:
        raise UserError(one_of("--input", given, INPUTS))
    both = [m for m in ("image", "text") if m in model.modalities and m in source.modalities]
    name = given or (both[0] if both else "image")
    for holder, held in (("the model was trained on", model.modalities), ("the data hold", source.modalities)):
        if lacking := [m for m in INPUTS[name] if m not in held]:
            raise UserError(f"--input={name!r}: {holder} {' and '.join(held)} alone, not {lacking[0]}")
    return INPUTS[name]


if __name__ == "__main__":
    _define_flags()
    command_line.run(_main)
