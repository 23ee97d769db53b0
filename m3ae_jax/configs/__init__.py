"""The configs that come with the project: ``--config=tiny``, or ``from m3ae_jax.configs import tiny`` in one of yours.

They are the files of the checkout's folder ``configs/``. A wheel holds them in this folder, which is else empty.
"""

from pathlib import Path

if not any(Path(__file__).parent.glob("[!_]*.py")):
    __path__ = [str(Path(__file__).parents[2] / "configs")]


def files() -> dict[str, Path]:
    """The configs' files by name."""
    return {file.stem: file for file in sorted(Path(__path__[0]).glob("[!_]*.py"))}
