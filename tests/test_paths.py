"""Paths as people write them."""

from pathlib import Path

import pytest

from m3ae_jax import inference
from m3ae_jax.errors import UserError
from m3ae_jax.paths import local


def test_a_home_is_taken_for_its_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local("~/a b", "x") == tmp_path / "a b"
    assert local(Path("a/b"), "x") == Path("a/b")
    assert local("~nobody-of-this-name/a", "x") == Path("~nobody-of-this-name/a")  # as a shell leaves it


def test_an_address_is_no_folder_of_this_machine() -> None:
    with pytest.raises(UserError, match="--workdir='gs://bucket/run' is an address"):
        local("gs://bucket/run", "--workdir")
    with pytest.raises(UserError, match="is an address"):
        inference.read("gs://bucket/run")
