"""What the README and the pages of docs/ say is there, and what they tell to type works."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from m3ae_jax import config as config_lib
from m3ae_jax.errors import UserError
from m3ae_jax.train.identity import Identity
from tests.test_inference import make_run

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[list[str]]:
    """The words of each command that a page tells to type."""
    lines = [line for block in blocks(text, "sh") for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(part) for line in lines for part in line.split(" && ")]


def test_item_14_the_readme_is_short_and_has_the_two_commands() -> None:
    assert len(README.splitlines()) <= 120
    train, test = (block for block in blocks(README, "sh") if block.startswith("python3 -m venv .venv &&"))
    assert train.endswith("-e . && .venv/bin/python -m m3ae_jax.main --config=configs/tiny.py\n")
    assert test.endswith("-e '.[dev]' && .venv/bin/python -m pytest -n 2 -q\n")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_item_14_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_item_14_every_command_of_a_page_has_a_config_and_fields_that_exist(page: Path) -> None:
    for words in commands(page.read_text(encoding="utf-8")):
        files = [word.removeprefix("--config=") for word in words if word.startswith("--config=configs/")]
        for file in files:
            config = config_lib.load(str(ROOT / file))
            pairs, _ = config_lib.split_overrides(words)
            config_lib.apply_overrides(config, [(name, value) for name, value in pairs if "$" not in value])


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the first command's run lies, shrunk."""
    folder = tmp_path_factory.mktemp("checkout")
    make_run(folder / "runs" / "tiny")
    (folder / "docs").mkdir()
    return folder


def test_item_14_the_snippet_runs_on_the_first_commands_run(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(checkout)
    (snippet,) = blocks(README, "python")
    names: dict[str, Any] = {}
    exec(snippet, names)
    first, second = capsys.readouterr().out.splitlines()
    assert first == "(1, 16)" and second.startswith(names["scene"].caption + " -> ")


@pytest.mark.slow
@pytest.mark.parametrize("beside", ["docs", "."])
def test_item_14_the_notebook_runs_on_the_first_commands_run(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, beside: str
) -> None:
    monkeypatch.chdir(checkout / beside)
    monkeypatch.delenv("M3AE_RUN", raising=False)
    monkeypatch.setenv("MPLBACKEND", "agg")
    notebook = json.loads((ROOT / "docs" / "use_a_model.ipynb").read_text(encoding="utf-8"))
    names: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert names["features"].cls.shape == (4, 16) and len(names["guessed"].texts) == 4


def with_gpus(folder: Path, monkeypatch: pytest.MonkeyPatch, told: str) -> None:
    """Puts an ``nvidia-smi`` that tells so in place of this machine's."""
    folder.mkdir(exist_ok=True)
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nprintf '{told}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


@pytest.mark.parametrize(
    ("told", "parts"),
    [("81559\\n", 1), ("24564\\n", 2), ("24564\\n8188\\n", 8), ("8188\\n", 8), ("No devices\\n", 4), ("[N/A]\\n", 4)],
)
def test_item_14_the_batch_of_one_gpu_is_cut_by_its_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str, parts: int
) -> None:
    with_gpus(tmp_path / "bin", monkeypatch, told)
    config = config_lib.resolve(config_lib.load(str(ROOT / "configs/one_gpu.py")))
    assert (config.batch_size, config.micro_batches) == (1024, parts)


def test_item_14_a_run_on_one_gpu_goes_on_on_another_and_another_batch_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no nvidia-smi at all
    before = config_lib.resolve(config_lib.load(str(ROOT / "configs/one_gpu.py")))
    with_gpus(tmp_path / "bin", monkeypatch, "8188\\n")
    config = config_lib.load(str(ROOT / "configs/one_gpu.py"))
    meta = {"config": before.to_dict()}
    assert config.micro_batches != before.micro_batches
    assert Identity(config_lib.resolve(config), {}).check("x", meta) == []
    config.batch_size = 2048
    with pytest.raises(UserError, match=r"batch_size=2048 \(the run has 1024\)"):
        Identity(config_lib.resolve(config), {}).check("x", meta)
