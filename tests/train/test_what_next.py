"""The last lines of a run say what can be done with it."""

import ast
import shlex
from pathlib import Path

import pytest

from m3ae_jax import config as config_lib
from m3ae_jax.train.loop import _what_next


@pytest.mark.parametrize("folder", ["/runs/tiny", "/my runs/it's $HOME"])
def test_item_15_the_end_of_a_run_names_its_page_and_commands_that_can_be_copied(folder: str) -> None:
    done, page, use, evaluate, longer = _what_next(Path(folder), 1200, config_lib.default()).splitlines()
    assert "1200 steps" in done and folder in done and page.endswith(f"{folder}/report.html")
    assert ast.literal_eval(use.partition("m3ae_jax.load(")[2][:-1]) == folder
    words = shlex.split(evaluate.partition(":    ")[2] or evaluate)
    assert words[-2:] == ["--mode=eval", f"--workdir={folder}"]
    words = shlex.split(longer.partition(":    ")[2])
    assert f"--config={folder}/config.json" in words and "--allow_config_change=duration" in words
    config = config_lib.default()
    config_lib.apply_overrides(config, config_lib.split_overrides(words)[0])
    assert config.duration == "2400 steps"


def test_item_15_commands_of_a_run_with_code_of_its_own_allow_it() -> None:
    config = config_lib.default()
    config.metrics.writers = ("my_writer:Mine",)
    _, _, use, evaluate, longer = _what_next(Path("/runs/tiny"), 1200, config).splitlines()
    for command in (evaluate, longer):
        overrides = config_lib.split_overrides(shlex.split(command.partition(":    ")[2] or command))[0]
        config_lib.check_named_code("config.json", config, overrides)
    assert use.endswith("load('/runs/tiny')")
    config.objective = "mine:Own"
    assert (
        _what_next(Path("/runs/tiny"), 1200, config)
        .splitlines()[2]
        .endswith("load('/runs/tiny', objective='mine:Own')")
    )
