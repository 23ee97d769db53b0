"""What all tests share: eight CPU devices, golden files, the folder of reference data."""

import atexit
import gc
import io
import json
import math
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest
from PIL import Image

# Read when the libraries start, so set before either is imported.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile much and compute little: XLA's optimiser would take most of their time.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_cpu_opt_preset=fast_compile --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true --xla_cpu_parallel_codegen_split_count=1",
)

# The tests and the programs that they start share what they compile, and leave the user's cache alone.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="m3ae_jax_tests_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

# So do the indices of data, and whatever else goes to the user's cache.
if not os.environ.get("XDG_CACHE_HOME", "").startswith(tempfile.gettempdir()):
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="m3ae_jax_tests_")
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)  # runs that are stopped and go on compile often

TESTS = Path(__file__).resolve().parent


MOST_MAPS = 30_000
"""Of a test process. Linux allows 65,530, of which each compiled program takes several: past that XLA aborts."""


@pytest.fixture(autouse=True)
def few_programs() -> Iterator[None]:
    """Lets go of compiled programs after a test, once there are many."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()
        gc.collect()


class Golden(Protocol):
    """Compares `obj` (JSON-able) with `tests/golden/<name>`; see the fixture `golden`."""

    def __call__(self, name: str, obj: Any, *, rtol: float | None = None) -> None: ...


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="rewrite the files of tests/golden instead of comparing"
    )


def _differences(want: Any, got: Any, rtol: float | None, at: str = "") -> Iterator[str]:
    """Where two JSON values differ, one line each; numbers may differ by `rtol` of the larger one."""
    if isinstance(want, dict) and isinstance(got, dict):
        for key in [*want, *(key for key in got if key not in want)]:
            if key not in got or key not in want:
                yield f"{at}.{key}: {'missing' if key in want else 'not in the golden file'}"
            else:
                yield from _differences(want[key], got[key], rtol, f"{at}.{key}")
    elif isinstance(want, list) and isinstance(got, list):
        if len(want) != len(got):
            yield f"{at}: {len(got)} items, the golden file has {len(want)}"
        for i, (w, g) in enumerate(zip(want, got, strict=False)):
            yield from _differences(w, g, rtol, f"{at}[{i}]")
    elif not _same(want, got, rtol):
        yield f"{at}: {got!r}, the golden file has {want!r}"


def _same(want: Any, got: Any, rtol: float | None) -> bool:
    """Whether two JSON leaves are equal, NaN to NaN included."""
    if isinstance(want, float) and isinstance(got, float) and math.isnan(want) and math.isnan(got):
        return True
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in (want, got))
    if rtol is not None and numbers:
        return math.isclose(want, got, rel_tol=rtol)
    return type(want) is type(got) and bool(want == got)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """`golden(name, obj, rtol=None)` fails unless `obj` equals the JSON file `tests/golden/<name>`.

    Tuples count as lists. With `rtol`, numbers may differ by that share of the larger one. With the flag
    `--update-golden` the file is rewritten instead.
    """
    update = request.config.getoption("--update-golden")

    def compare(name: str, obj: Any, *, rtol: float | None = None) -> None:
        path = TESTS / "golden" / name
        got = json.loads(json.dumps(obj))
        if update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(obj, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            return
        hint = "if it should be so, run pytest with --update-golden and commit the file"
        if not path.exists():
            pytest.fail(f"tests/golden/{name} does not exist; {hint}", pytrace=False)
        lines = list(_differences(json.loads(path.read_text(encoding="utf-8")), got, rtol))
        if lines:
            more = [f"... and {len(lines) - 10} more"] if len(lines) > 10 else []
            head = f"tests/golden/{name} differs in {len(lines)} places; {hint}"
            pytest.fail("\n  ".join([head, *lines[:10], *more]), pytrace=False)

    return compare


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data beside the repository; a test that asks for it is skipped without."""
    path = TESTS.parent.parent / "shared"
    if not path.is_dir():
        pytest.skip("needs the reference data of ../shared, which is not here")
    return path


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that a failed save leaves behind wait 10 seconds for their end, not 5 minutes; so does pytest's."""
    from orbax.checkpoint._src.multihost import multihost

    monkeypatch.setattr(multihost, "coordination_timeout", lambda: 10)


@pytest.fixture
def tar_shard(tmp_path: Path) -> Path:
    """A WebDataset shard of 40 small pictures of one colour, each captioned with its number."""
    path = tmp_path / "shards" / "00000.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for i in range(40):
            picture = io.BytesIO()
            Image.new("RGB", (24, 16), (i * 6, 255 - i * 6, i * 3)).save(picture, "PNG")
            for suffix, data in (("png", picture.getvalue()), ("txt", f"a red circle {i}".encode())):
                member = tarfile.TarInfo(f"{i:05d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path
