"""The figures of two runs of a benchmark beside each other."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from m3ae_jax.errors import UserError


def load(path: Path, what: str) -> dict[str, Any]:
    """What ``--output`` wrote.

    Args:
        path: the file.
        what: what is to be measured now.

    Raises:
        UserError: it cannot be read, or is of another benchmark.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--compare={path}: {error}") from None
    if not isinstance(record, dict) or "what" not in record:
        raise UserError(f"--compare={path}: not a file that --output of this program wrote")
    if record["what"] != what:
        raise UserError(f"--compare={path} is of --what={record['what']}, not of --what={what}")
    return record


def table(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Lines ``figure  before -> now  x ratio`` of the numbers that both have; of several measurements the median.

    A setting (a text) that differs comes first, for then the ratios compare two things.
    """
    old, new = dict(_flat(before)), dict(_flat(now))
    shared = [name for name in new if name in old]
    width = max((len(name) for name in shared), default=0)
    lines: list[str] = []
    for name in shared:
        a, b = old[name], new[name]
        if isinstance(a, str) or isinstance(b, str):
            if a != b:
                lines.insert(0, f"  {name:<{width}}  {a} -> {b}: not the same")
        elif a or b:
            ratio = f"x {b / a:.3f}" if a else ""
            lines.append(f"  {name:<{width}}  {a:.6g} -> {b:.6g}  {ratio}")
    return "\n".join(lines)


def _flat(record: Any, name: str = "") -> Iterator[tuple[str, float | str]]:
    if isinstance(record, list) and record and all(isinstance(x, (int, float)) for x in record):
        yield name, statistics.median(record)
    elif isinstance(record, (Mapping, list)):
        for key, value in record.items() if isinstance(record, Mapping) else enumerate(record):
            yield from _flat(value, f"{name}.{key}" if name else str(key))
    elif isinstance(record, (int, float, str)):
        yield name, record
