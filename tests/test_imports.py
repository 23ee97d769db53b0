"""Who may import what: read from the source, and tried with TensorFlow out of reach."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "m3ae_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
TENSORFLOW_FOLDERS = ("m3ae_jax.data", "m3ae_jax.metrics", "m3ae_jax.console")
NOT_FOR = {
    "models": ("objectives", "train", "evals", "plan", "data", "parallel", "checkpoint", "metrics", "report"),
    "data": ("objectives", "train", "evals", "plan", "models", "parallel", "checkpoint", "metrics", "report"),
    "objectives": ("train", "evals", "plan", "checkpoint", "metrics", "report"),
    "parallel": ("objectives", "train", "evals", "plan", "data", "checkpoint", "metrics", "report"),
    "checkpoint": ("objectives", "train", "evals", "plan", "data", "models", "metrics", "report"),
    "metrics": ("objectives", "train", "evals", "plan", "data", "models", "checkpoint"),
    "plan": ("evals", "checkpoint", "metrics", "report"),
    "report": ("objectives", "train", "evals", "plan", "data", "models", "checkpoint"),
}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(node: ast.AST, late: bool = False) -> Iterator[tuple[str, bool]]:
    """Every module that is imported below a node, and whether within a function.

    ``from a import b`` gives both ``a`` and ``a.b``, as `b` may be a module.
    """
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, late) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0 and child.module, "imports are absolute"
            yield child.module, late
            yield from ((f"{child.module}.{alias.name}", late) for alias in child.names)
        else:
            yield from imports(child, late or isinstance(child, FUNCTIONS))


def imports_of(path: Path) -> list[tuple[str, bool]]:
    return list(imports(ast.parse(path.read_text(encoding="utf-8"))))


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def test_the_package_was_found() -> None:
    assert {path.parent.name for path in FILES} >= {"m3ae_jax", *NOT_FOR, "train", "evals"}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_flow_one_way(path: Path) -> None:
    folder = path.relative_to(PACKAGE).parts[0]
    banned = [f"m3ae_jax.{name}" for name in NOT_FOR.get(folder, ())] + ["m3ae_jax.main"]
    assert not [name for name, _ in imports_of(path) if any(within(name, package) for package in banned)]


@pytest.mark.parametrize("path", sorted((PACKAGE / "data").rglob("*.py")), ids=module_name)
def test_data_knows_no_jax(path: Path) -> None:
    libraries = ("jax", "jaxlib", "flax", "optax", "orbax")
    assert not [name for name, _ in imports_of(path) if any(within(name, library) for library in libraries)]


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_tensorflow_is_imported_late_and_in_few_places(path: Path) -> None:
    for name, late in imports_of(path):
        if within(name, "tensorflow"):
            assert late, "import tensorflow inside the function that needs it"
            assert any(within(module_name(path), allowed) for allowed in TENSORFLOW_FOLDERS)


WITHOUT_TENSORFLOW = """
import sys
sys.modules["tensorflow"] = None  # whoever imports it gets an ImportError

import jax
import numpy as np

import m3ae_jax.checkpoint.manager
import m3ae_jax.objectives.m3ae
from m3ae_jax import config as config_lib
from m3ae_jax.data.pipeline import Group
from m3ae_jax.objectives.base import build
from m3ae_jax.parallel.mesh import make_mesh, put_batch
from m3ae_jax.train.optimizer import optimizer, schedule
from m3ae_jax.train.step import init_state, train_step

c = config_lib.default()
c.batch_size = 2
c.optimizer.warmup = "0 steps"
c.data.image_size, c.data.patch_size, c.data.max_text_tokens = 16, 8, 6
c.model.width, c.model.depth, c.model.heads = 16, 1, 2
c.model.decoder_width, c.model.decoder_depth, c.model.decoder_heads = 16, 1, 2
c = config_lib.resolve(c)
objective = build(c, vocab_size=11)
rng = np.random.default_rng(0)


def tokens(group: Group, slots: int) -> dict[str, np.ndarray]:
    shape = (2, slots, 8 * 8 * 3) if group.modality == "image" else (2, slots)
    value = rng.integers(0, 11, shape).astype(np.uint8 if group.modality == "image" else np.int32)
    position = np.tile(np.arange(slots, dtype=np.int32), (2, 1))
    return {"value": value, "position": position, "valid": np.ones((2, slots), bool)}


groups = {g.name: {"visible": tokens(g, g.budget[0]), "target": tokens(g, g.budget[1])} for g in objective.groups}
batch = {"groups": groups, "example": {}, "aux": {}}
mesh = make_mesh()
chain = optimizer(c, schedule(c, 10, 100))
state = init_state(objective, chain, mesh, c.seed)
state, figures = jax.jit(train_step(objective, chain, c.seed))(state, put_batch(batch, mesh))
assert int(state.step) == 1 and np.isfinite(float(figures["loss"])) and float(figures["gradient_norm"]) > 0
assert not [name for name, module in sys.modules.items() if name.split(".")[0] == "tensorflow" and module]
"""


@pytest.mark.slow
def test_a_train_step_runs_where_tensorflow_is_not_installed() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TENSORFLOW], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
