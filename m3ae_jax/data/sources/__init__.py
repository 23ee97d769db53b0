"""Where examples come from; one file per format."""

from __future__ import annotations

from ml_collections import ConfigDict

from m3ae_jax.data.sources.base import Source
from m3ae_jax.errors import UserError, one_of

NAMES = ("scenes", "webdataset")

_FORMS = (
    "a folder of .tar shards as img2dataset writes them (KEY.jpg|jpeg|png|webp + KEY.txt and/or KEY.json), a glob, "
    "DIR/{00000..00099}.tar, or several of these with commas"
)


def build_source(config: ConfigDict, part: str) -> Source:
    """Opens ``config.data.train`` or ``config.data.val``.

    Args:
        config: the config.
        part: ``train`` or ``val``.

    Raises:
        UserError: an unknown source, or a path that is missing or holds nothing.
    """
    spec, field = config.data[part], f"data.{part}"
    if spec.source == "scenes":
        from m3ae_jax.data.sources.scenes import SceneOptions, ScenesSource

        return ScenesSource(spec.split, SceneOptions(**config.data.scenes.to_dict()))
    if spec.source == "webdataset":
        if not spec.path:
            raise UserError(
                f"{field}.path is empty; it takes {_FORMS}. To try without data of your own: "
                "python -m m3ae_jax.main --config=configs/tiny.py"
            )
        from m3ae_jax.data.sources.webdataset import WebDatasetSource

        try:
            return WebDatasetSource(spec.path, caption_key=spec.caption_key)
        except OSError as error:
            raise UserError(f"{field}.path={spec.path!r} cannot be read: {error}") from error
    raise UserError(one_of(f"{field}.source", spec.source, NAMES))
