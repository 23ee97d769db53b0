r"""Trains a SentencePiece model on a source's captions.

    python -m m3ae_jax.data.train_tokenizer \
        --source=webdataset --path=DIR --output=FILE.model --vocab_size=8000

The same captions and options give the same file, byte for byte. Id 0 is padding and id 1 the unknown piece;
there is no bos or eos. `--model_type=unigram` (the default) splits words into pieces and folds case and
compatibility forms (`nmt_nfkc_cf`, 240 kB of the file). `--model_type=word` has one piece for every word as
written between blanks, for a closed vocabulary; the model built into the package came from

    python -m m3ae_jax.data.train_tokenizer \
        --source=scenes --model_type=word --output=m3ae_jax/data/scenes.model
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece as spm
from absl import flags

from m3ae_jax import command_line
from m3ae_jax.atomic import replacing
from m3ae_jax.data import images
from m3ae_jax.data.sources import NAMES, format_class, open_format
from m3ae_jax.data.sources.base import OPTIONS, Source, SourceOptions, report_of
from m3ae_jax.data.sources.index import Tally, left_out
from m3ae_jax.data.sources.scenes import ScenesSource
from m3ae_jax.data.text import clean_caption
from m3ae_jax.errors import UserError, one_of

MODEL_TYPES: dict[str, dict[str, Any]] = {
    # 0.05 % of the characters (rare scripts, emoji) become unknown, or each would take an id.
    "unigram": {"normalization_rule_name": "nmt_nfkc_cf", "character_coverage": 0.9995},
    "word": {"normalization_rule_name": "identity", "character_coverage": 1.0},
}

_CHUNK = 1_000  # captions read at a time
_MAX_CHARS = 1_000  # of a caption; the trainer silently leaves out lines over 4,192 bytes
_SCENES_CAPTIONS = 5_000  # every word is among them, and each read draws a picture


def train(captions: Iterable[str], output: str, vocab_size: int, model_type: str = "unigram") -> int:
    """Trains a SentencePiece model and writes it in one move, so that no half-written file is ever seen.

    Args:
        captions: clean text (`m3ae_jax.data.text.clean_caption`); empty ones are left out.
        output: the file to write, `*.model`; its folder is made.
        vocab_size: number of ids at most, those of padding and the unknown piece included.
        model_type: "unigram" or "word".

    Returns:
        The number of ids, less than `vocab_size` when the captions have too little variety for more.

    Raises:
        UserError: an unusable `output` or `model_type`, no caption with text, or a `vocab_size` too small for
            the captions' characters.
    """
    if model_type not in MODEL_TYPES:
        raise UserError(one_of("model_type", model_type, MODEL_TYPES))
    if not output.endswith(".model"):
        raise UserError(f"output={output!r} must end in .model, by which a tokenizer file is recognised")
    if vocab_size < 3:
        raise UserError(f"vocab_size={vocab_size} is too small: padding, the unknown piece and one more make 3")
    lines = [caption for caption in captions if caption]
    if not lines:
        raise UserError("the source has no caption with text in it")
    model = _train(lines, vocab_size, model_type)
    try:
        with replacing(Path(output)) as fresh:
            fresh.write_bytes(model)
    except OSError as error:
        raise UserError(f"output={output!r} cannot be written ({error.strerror})") from error
    processor = spm.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    return processor.vocab_size()


def read_captions(source: Source, max_captions: int, tally: Tally | None = None) -> Iterator[str]:
    """Clean captions of a source, evenly spaced over it when it has more than `max_captions`.

    Args:
        source: any with captions; examples without one are passed over.
        max_captions: how many at most.
        tally: counts the examples that are passed over, and the captions without words.
    """
    tally = tally if tally is not None else Tally()
    count = min(len(source), max_captions)
    for start in range(0, count, _CHUNK):
        positions = np.arange(start, min(start + _CHUNK, count), dtype=np.int64)
        indices = positions * len(source) // count
        for index, record in zip(indices.tolist(), source.read(indices), strict=True):
            if "caption" not in record:
                tally.add(record.get("unusable", images.NO_CAPTION), f"example {index}")
                continue
            caption = clean_caption(record["caption"], _MAX_CHARS)
            if not caption:
                tally.add(images.NO_WORDS, f"example {index}")
            yield caption


def _train(lines: list[str], vocab_size: int, model_type: str) -> bytes:
    model = io.BytesIO()
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            pad_id=0,
            unk_id=1,
            bos_id=-1,
            eos_id=-1,
            # A fixed number, because the threads' partial sums are added up: another gives another model.
            num_threads=4,
            minloglevel=2,
            **MODEL_TYPES[model_type],
        )
    except RuntimeError as error:
        raise UserError(_explain(str(error), vocab_size)) from error
    return model.getvalue()


def _explain(error: str, vocab_size: int) -> str:
    """Says in the user's terms what the trainer's assertion means."""
    needed = re.search(r"smaller than required_chars\. \d+ vs (\d+)", error)
    if needed:
        return f"vocab_size={vocab_size} is too small: these captions' characters need at least {needed[1]}"
    reason = " ".join(error.split())
    return f"vocab_size={vocab_size}: no model can be made of these captions; SentencePiece says {reason!r}"


def _define_flags() -> None:
    # Not at import: a program that imports `train` may have a flag of the same name.
    flags.DEFINE_string("source", None, f"Where the captions are: {', '.join(NAMES)}.", required=True)
    flags.DEFINE_string("path", "", "The source's files, as in a config; not for scenes.")
    flags.DEFINE_string("output", None, "The file to write, *.model.", required=True)
    flags.DEFINE_integer("vocab_size", 8_000, "Number of ids at most.")
    flags.DEFINE_string("model_type", "unigram", f"{' or '.join(MODEL_TYPES)}.")
    flags.DEFINE_integer("max_captions", 1_000_000, "Captions to learn from at most (scenes: 5,000).")
    flags.DEFINE_string("split", "train", "Of tfds, and of hdf5 with several.")
    flags.DEFINE_string("caption_key", "", "Name of the caption field; empty: the usual names.")


def _main(argv: list[str]) -> None:
    args = flags.FLAGS
    try:
        if args.max_captions < 1:
            raise UserError(f"max_captions={args.max_captions} must be at least 1")
        source, limit, tally = _open(args), args.max_captions, Tally()
        if args.source == "scenes":
            limit = min(limit, _SCENES_CAPTIONS)
        size = train(read_captions(source, limit, tally), args.output, args.vocab_size, args.model_type)
    except OSError as error:
        raise UserError(str(error)) from None
    print(_summary(args.output, source, min(len(source), limit), size, tally))


def _open(args: Any) -> Source:
    """The source that the flags name, with an example for each caption where the format has several a picture."""
    if args.source == "scenes":
        return ScenesSource("train")
    has_several = "captions" in getattr(format_class(args.source, "--"), "uses", OPTIONS)
    captions = "all" if has_several else "draw"
    options = SourceOptions(split=args.split, caption_key=args.caption_key, captions=captions)
    return open_format(args.source, args.path, options, "--")


def _summary(output: str, source: Source, read: int, size: int, tally: Tally) -> str:
    """What was made of what, and what was left out: here, and by the source."""
    used = tally.report(1, read - sum(count for count, _ in tally.skipped.values()))
    lines = [f"{output}: {size} ids from {used.examples} captions{left_out(used)}"]
    report = report_of(source)
    if report and (told := left_out(report)):
        lines.append(f"of the source{told}")
    return "\n".join(lines)


if __name__ == "__main__":
    _define_flags()
    command_line.run(_main)
