"""Who may import and name what: read from the source, and tried with TensorFlow out of reach."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "m3ae_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
TENSORFLOW_FOLDERS = ("m3ae_jax.data", "m3ae_jax.metrics", "m3ae_jax.console")
NOT_FOR = {
    "models": ("objectives", "train", "evals", "plan", "data", "parallel", "checkpoint", "metrics", "report"),
    "train": ("evals", "plan", "report", "sweep", "convert"),
    "data": ("objectives", "train", "evals", "plan", "models", "parallel", "checkpoint", "metrics", "report"),
    "objectives": ("train", "evals", "plan", "checkpoint", "metrics", "report"),
    "parallel": ("objectives", "train", "evals", "plan", "data", "checkpoint", "metrics", "report"),
    "checkpoint": ("objectives", "train", "evals", "plan", "data", "models", "metrics", "report"),
    "metrics": ("objectives", "train", "evals", "plan", "data", "models", "checkpoint"),
    "plan": ("evals", "checkpoint", "metrics", "report"),
    "report": ("objectives", "train", "evals", "plan", "data", "models", "checkpoint"),
}
ALLOWED = {"models": "m3ae_jax.data.tokens"}
"""One module of a banned package."""

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
            assert child.module and child.level == 0, "imports are absolute"
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
    allowed = ALLOWED.get(folder)
    # `from m3ae_jax.data.tokens import x` gives the module and names in it.
    names = [name for name, _ in imports_of(path) if not (allowed and within(name, allowed))]
    assert not [name for name in names if any(within(name, package) for package in banned)]


def edges(path: Path, modules: Collection[str]) -> set[str]:
    """The modules of the package that one imports, anywhere in it; ``from a import b`` is `a.b` if that is one."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parent = ".".join(path.relative_to(ROOT).parts[: -node.level]) if node.level else ""
            module = ".".join(filter(None, (parent, node.module)))
            members = [f"{module}.{alias.name}" for alias in node.names]
            names += [member if member in modules else module for member in members]
    return {name for name in names if name in modules}


def test_imports_make_no_circle() -> None:
    modules = {module_name(path): path for path in FILES}
    graph = {name: edges(path, modules) for name, path in modules.items()}
    assert graph["m3ae_jax.models.encoder"] >= {"m3ae_jax.data.tokens", "m3ae_jax.models.transformer"}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def docstrings(tree: ast.Module) -> set[int]:
    """The `id` of every docstring in a module, those of attributes too."""
    bodies = (node.body for node in ast.walk(tree) if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS[:2])))
    return {id(statement.value) for body in bodies for statement in body if isinstance(statement, ast.Expr)}


def words(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Every name that a module defines, imports or reads as an attribute, and every string but docstrings."""
    prose = docstrings(tree)
    for node in ast.walk(tree):
        match node:
            case ast.Constant(value=str(text)) if id(node) not in prose:
                yield node.lineno, text
            case ast.alias(name=name, asname=other):
                yield node.lineno, f"{name} {other}"
            case ast.ImportFrom(module=name) if name:
                yield node.lineno, name
            case ast.Attribute(attr=name) | ast.Name(id=name) | ast.arg(arg=name) | ast.keyword(arg=str(name)):
                yield node.lineno, name
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield node.lineno, name


def trees_outside(*folders: str) -> dict[str, ast.Module]:
    """The syntax tree of each module that is not in one of the folders of the package."""
    paths = [path for path in FILES if not any(path.is_relative_to(PACKAGE / folder) for folder in folders)]
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def test_no_code_names_an_objective() -> None:
    """Checkpoints of other projects are the subject of convert/, their programs that of benchmark/peers/."""
    named = re.compile("m3ae|mae|mamo|simla|fourm", re.IGNORECASE)
    trees = trees_outside("objectives", "config", "convert", "benchmark/peers")
    assert not [
        f"{path}:{line}: {text}"
        for path, tree in trees.items()
        for line, text in words(tree)
        if named.search(text.replace("m3ae_jax", ""))
    ]


MODEL_FIELDS = re.compile(r"(decoder_)?(width|depth)|(\w+_)?mask_ratio")


def fields_read(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Every field that is read of a ``model`` or ``m3ae`` group, also by a local name of the group."""

    def member(node: ast.AST) -> str:
        match node:
            case ast.Attribute(attr=name) | ast.Subscript(slice=ast.Constant(value=str(name))):
                return name
        return ""

    groups = {"model", "m3ae"}
    local = {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and member(node.value) in groups
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Subscript):
            group = node.value
            if member(group) in groups or (isinstance(group, ast.Name) and group.id in local):
                yield node.lineno, member(node)


def test_sizes_and_mask_ratios_are_the_models_and_the_objectives_business() -> None:
    trees = trees_outside("objectives", "config", "models", "convert")
    assert not [
        f"{path}:{line}: {name}"
        for path, tree in trees.items()
        for line, name in fields_read(tree)
        if MODEL_FIELDS.fullmatch(name)
    ]


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


@pytest.mark.parametrize("program", ["main", "benchmark.__main__", "sweep.__main__"])
def test_the_programs_begin_without_jax(program: str) -> None:
    """They fork, or set its environment, before it is imported."""
    code = f"import sys, m3ae_jax.{program}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120).returncode == 0


WITHOUT_TENSORFLOW = """
import sys
sys.modules["tensorflow"] = None  # whoever imports it gets an ImportError

import jax
import numpy as np

import m3ae_jax.checkpoint.manager
import m3ae_jax.objectives.m3ae
from m3ae_jax import config as config_lib
from m3ae_jax.objectives.base import build
from m3ae_jax.objectives.batch import abstract_part
from m3ae_jax.parallel.mesh import make_mesh, put_batch
from m3ae_jax.train.optimizer import optimizer, schedule
from m3ae_jax.train.step import init_state, train_step

c = config_lib.default()
c.batch_size = 2
c.optimizer.warmup = "0 steps"
c.data.image_size, c.data.patch_size, c.data.max_text_tokens = 16, 8, 6
c.model.width, c.model.depth, c.model.heads = 16, 1, 2
c.m3ae.decoder_width, c.m3ae.decoder_depth, c.m3ae.decoder_heads = 16, 1, 2
c = config_lib.resolve(c)
objective = build(c, vocab_size=11)
rng = np.random.default_rng(0)
part = jax.tree.map(lambda x: rng.integers(0, 2, x.shape).astype(x.dtype), abstract_part(objective.groups, 2))
batch = {"all": part}
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
