"""The bounds of what the package needs, and the versions that are tested (.ci/newest.txt, .ci/oldest.txt), are one."""

import re
import runpy
import sys
from pathlib import Path
from unittest import mock

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.11", "3.12", "3.13")


def needed() -> list[Requirement]:
    """Of requirements.txt, and of the extra `dev`."""
    with mock.patch("setuptools.setup") as setup, mock.patch.object(sys, "argv", ["setup.py"]):
        runpy.run_path(str(ROOT / "setup.py"), run_name="__main__")
    declared = setup.call_args.kwargs
    return [Requirement(line) for line in [*declared["install_requires"], *declared["extras_require"]["dev"]]]


def versions(which: str, python: str) -> dict[str, Version]:
    """What .ci/run installs on a Python (Linux on x86), by canonical name."""
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
        "platform_machine": "x86_64",
        "platform_system": "Linux",
        "os_name": "posix",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }
    lines = [Requirement(line) for line in (ROOT / ".ci" / f"{which}.txt").read_text().splitlines()]
    held = [line for line in lines if line.marker is None or line.marker.evaluate(environment)]
    return {canonicalize_name(line.name): Version(str(line.specifier).removeprefix("==")) for line in held}


def wrong_bounds(requirement: Requirement, oldest: Version, newest: Version) -> list[str]:
    """What is wrong with the bounds of a requirement whose oldest and newest tested versions are these."""
    wrong = []
    if not requirement.specifier.contains(newest, prereleases=True):
        wrong.append(f"{requirement}: {newest} is tested")
    (low,) = [Version(s.version) for s in requirement.specifier if s.operator == ">="]
    if oldest.release[: len(low.release)] != low.release and oldest != low:
        wrong.append(f"{requirement}: the oldest that is tested is {oldest}")
    return wrong


@pytest.mark.parametrize("python", PYTHONS)
def test_bounds_are_those_of_the_tested_versions(python: str) -> None:
    oldest, newest = versions("oldest", python), versions("newest", python)
    requirements = needed()
    assert len(requirements) > 20
    wrong = [
        line
        for requirement in requirements
        for name in [canonicalize_name(requirement.name)]
        for line in wrong_bounds(requirement, oldest[name], newest[name])
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("bounds", "wrong"),
    [
        ("jax>=0.10,<0.13", False),
        ("jax>=0.10.0,<0.13", False),
        ("jax>=0.10,<0.12", True),
        ("jax>=0.9,<0.13", True),
        ("jax>=0.10.1,<0.13", True),
    ],
)
def test_a_bound_that_is_not_what_is_tested_is_wrong(bounds: str, wrong: bool) -> None:
    assert bool(wrong_bounds(Requirement(bounds), Version("0.10.0"), Version("0.12.0.1"))) == wrong


def test_the_pythons_are_the_same_everywhere() -> None:
    low, high = Version(PYTHONS[0]), Version(PYTHONS[-1])
    setup = (ROOT / "setup.py").read_text()
    assert f'python_requires=">={low},<{high.major}.{high.minor + 1}"' in setup
    assert re.findall(r"Python :: (3\.\d+)", setup) == list(PYTHONS)
    ci = (ROOT / ".ci" / "run").read_text()
    assert f"newest) pythons=({' '.join(reversed(PYTHONS))})" in ci and f"oldest) pythons=({' '.join(PYTHONS)})" in ci
