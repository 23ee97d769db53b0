"""What the data doctor's section is of: kept beside it, so that a run's page shows none of other data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_FIELDS = (
    "source", "path", "split", "image_key", "caption_key", "label_key", "captions", "template", "caption_per_line",
)  # fmt: skip


def subject(config: Mapping[str, Any]) -> dict[str, Any]:
    """Which data and which tokenizer a config names.

    Args:
        config: as ``config.json`` holds it; whatever is missing or strange in it stands for itself.

    Returns:
        ``tokenizer`` and ``sources``, each source by its name with the fields that say what is read.
    """
    data = _group(config.get("data"))
    mixture = _group(data.get("mixture"))
    sources = {f"data.mixture.{name}": spec for name, spec in sorted(mixture.items())}
    sources = sources or {"data.train": data.get("train")}
    sources["data.val"] = data.get("val")
    fields = {name: {key: _group(spec).get(key) for key in _FIELDS} for name, spec in sources.items()}
    return {"tokenizer": data.get("tokenizer"), "sources": fields}


def _group(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
