"""Every field of a config, by the groups that the code declares.

A config is a Python file with a function `get_config()`. `--config=tiny` names one that comes with the project (the
checkout's folder `configs/`, installed as `m3ae_jax.configs`), `--config=mine` or `--config=mine.py` a file of the
current folder, which comes first, and a path any other. A config of yours may start from another, by
`from m3ae_jax.configs import tiny` and `c = tiny.get_config()`, and import files that lie beside it.

A field is set in that file, or on the command line, as `--config.optimizer.learning_rate=1e-3`. Exactly one objective's
group is there, that of the chosen one. A duration is "N steps", "N examples" or "N epochs". Of a field that is marked
"yes" another value makes another run; the others may change when a run goes on. This page is written by
`python -m m3ae_jax.config --output=docs/config.md`.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import itertools
from pathlib import Path

from m3ae_jax.config.fields import Setting, declared
from m3ae_jax.config.schema import GROUPS, OBJECTIVES, identifies, imported, join, objective_fields


def meanings(group: type) -> dict[str, str]:
    """What each field of a group means: the docstring below it."""
    texts = {}
    for kind in reversed(group.__mro__[:-1]):
        (definition,) = ast.parse(inspect.getsource(kind)).body
        for field, text in itertools.pairwise(getattr(definition, "body", ())):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                texts[ast.unparse(field.target)] = " ".join(ast.literal_eval(text.value).split())
    return texts


def markdown() -> str:
    """The text of ``docs/config.md``."""
    parts = [f"# The fields of a config\n\n{__doc__}"]
    classes = {path: (imported(where), "m3ae") for path, where in GROUPS.items()}
    for objective in OBJECTIVES:
        classes |= {path: (group, objective) for path, group in objective_fields(objective).items()}
    for path, (group, objective) in classes.items():
        texts = meanings(group)
        parts.append(f"\n## {path or 'The run'}\n\n{inspect.getdoc(group)}\n")
        parts.append("| field | default | allowed | another run | meaning |\n|---|---|---|---|---|")
        for name, setting in declared(group).items():
            marked = "yes" if identifies(join(path, name), objective) else ""
            cells = (f"`{join(path, name)}`", f"`{setting.default!r}`", _allowed(setting), marked, texts[name])
            parts.append("| " + " | ".join(cells) + " |")
    return "\n".join(parts) + "\n"


def _allowed(setting: Setting) -> str:
    if setting.duration:
        return "duration"
    if setting.low is not None:
        return f"{setting.low} to {setting.high}" if setting.high < 10**12 else f"from {setting.low}"
    return ", ".join(setting.choices)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Prints docs/config.md.")
    parser.add_argument("--output", type=Path, default="/dev/stdout", help="the file to write instead")
    parser.parse_args().output.write_text(markdown(), encoding="utf-8")
