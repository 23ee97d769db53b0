"""What an installation holds, and that it works where no checkout is."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD = """
from setuptools import build_meta
build_meta.build_wheel("../wheel")
build_meta.build_editable("../editable")
"""
MINE = """
from mybase import get_config as base

def get_config():
    c = base()
    c.seed = 5
    return c
"""
MYBASE = """
from m3ae_jax.configs import tiny

def get_config():
    c = tiny.get_config()
    c.batch_size = 32
    return c
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the checkout, `m3ae_jax`, and what pip would unpack: `site`, and `editable_site`."""
    folder = tmp_path_factory.mktemp("packaging")
    checkout = folder / "m3ae_jax"
    for name in ("m3ae_jax", "configs", "tests/golden", "launch"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "requirements.txt", "LICENSE"):
        shutil.copy(ROOT / name, checkout / name)
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=checkout, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for built, site in (("wheel", "site"), ("editable", "editable_site")):
        (wheel,) = (folder / built).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder / site)
    return folder


def python(*arguments: str, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PYTHONPATH": str(path)} if path else {}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)


def test_item_8_the_wheel_holds_the_package_alone_with_the_configs_in_it(installed: Path) -> None:
    site = installed / "site"
    package, information = sorted(site.iterdir())
    assert package.name == "m3ae_jax" and information.suffix == ".dist-info"
    shipped = {path.name: path.read_bytes() for path in (package / "configs").glob("*.py")}
    assert shipped.pop("__init__.py")
    assert shipped == {path.name: path.read_bytes() for path in (ROOT / "configs").glob("*.py")}
    ours = {path.relative_to(ROOT) for path in (ROOT / "m3ae_jax").rglob("*.*") if path.suffix != ".pyc"}
    assert {path for path in ours if not (site / path).exists()} == set(), "files of the package that are not shipped"
    assert "m3ae_jax = m3ae_jax.__main__:run" in (information / "entry_points.txt").read_text()


def test_item_8_the_wheel_is_used_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    site = installed / "site"
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "mybase.py").write_text(MYBASE)
    command = f"import sys; sys.path.insert(0, {str(site)!r}); from m3ae_jax.__main__ import run; run()"
    done = python("-c", command, "--config=mine", "--mode=print_config", cwd=tmp_path, path=site)
    assert done.returncode == 0, done.stderr
    assert "batch_size=32" in done.stdout and "seed=5" in done.stdout and "model.width=128" in done.stdout
    done = python("-m", "m3ae_jax", "--config=nosuch", cwd=tmp_path, path=site)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "base, binding, claims, contrastive, huge, large, mae, mamo, mine.py, mixture, mybase.py," in done.stderr
    done = python("-c", "import m3ae_jax.configs.tiny as tiny; print(tiny.__file__)", cwd=tmp_path, path=site)
    assert done.stdout.strip() == str(site / "m3ae_jax" / "configs" / "tiny.py")


def test_item_8_an_editable_install_is_found_beside_a_folder_of_its_name(installed: Path) -> None:
    site, checkout = installed / "editable_site", installed / "m3ae_jax"
    (path,) = site.glob("*.pth")
    assert path.read_text().strip() == str(checkout), "a path; a hook would lose to the current folder"
    code = (
        f"import site; site.addsitedir({str(site)!r}); import m3ae_jax, m3ae_jax.configs as configs;"
        "print(m3ae_jax.__version__, *configs.files().values(), sep='\\n')"
    )
    (checkout / "configs" / "another.py").write_text("")
    done = python("-S", "-c", code, cwd=installed)  # -S: without the installation that runs the tests
    assert done.returncode == 0, done.stderr
    version, *files = done.stdout.splitlines()
    assert version and files == sorted(str(file) for file in (checkout / "configs").glob("*.py"))
    assert str(checkout / "configs" / "another.py") in files
