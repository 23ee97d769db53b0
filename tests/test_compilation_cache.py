"""Where compiled programs are stored, and where not."""

import os
import subprocess
import sys
import time

import pytest

from m3ae_jax import compilation_cache

DIR = "JAX_COMPILATION_CACHE_DIR"


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")})
    return tmp_path / "cache" / "m3ae_jax"


def test_it_lies_in_a_folder_of_the_user_alone(home):
    compilation_cache.use()
    folder = os.environ[DIR]
    assert os.path.dirname(folder) == str(home) and os.stat(folder).st_mode & 0o777 == 0o700
    del os.environ[DIR]
    compilation_cache.use()
    assert os.environ[DIR] == folder  # the same machine


def test_jax_own_settings_come_first(home):
    os.environ[DIR] = ""
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "7"
    compilation_cache.use()
    assert os.environ[DIR] == "" and os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] == "7"
    assert not home.exists()


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777])
def test_a_folder_that_others_may_write_to_is_not_used(home, mode):
    compilation_cache.use()
    os.chmod(os.environ.pop(DIR), mode)
    compilation_cache.use()
    assert DIR not in os.environ


def test_a_link_is_not_used(home, tmp_path):
    compilation_cache.use()
    folder = os.environ.pop(DIR)
    os.rename(folder, tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", folder)
    compilation_cache.use()
    assert DIR not in os.environ


@pytest.mark.parametrize("mode", [0o777, 0o775])
def test_nor_one_whose_place_another_could_take(home, mode, monkeypatch):
    home.parent.mkdir()
    home.parent.chmod(mode)
    monkeypatch.setattr(compilation_cache, "_own_group_alone", lambda status: False)
    compilation_cache.use()
    assert DIR not in os.environ
    home.parent.chmod(mode | 0o1000)  # sticky: only owners move what is within
    compilation_cache.use()
    assert DIR in os.environ


def test_a_relative_cache_home_is_ignored(home, tmp_path):
    os.environ["XDG_CACHE_HOME"] = "somewhere"
    compilation_cache.use()
    assert os.environ[DIR].startswith(str(tmp_path / ".cache" / "m3ae_jax"))


def test_without_a_home_there_is_none(home, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    del os.environ["XDG_CACHE_HOME"]
    monkeypatch.setattr(compilation_cache.Path, "home", homeless)
    compilation_cache.use()
    assert DIR not in os.environ


def test_where_no_folder_can_be_made_there_is_none(home):
    home.parent.write_text("a file")
    compilation_cache.use()
    assert DIR not in os.environ


def test_what_is_old_is_removed(home):
    compilation_cache.use()
    folder = os.environ.pop(DIR)
    for name, days in (("a-cache", 31), ("b-cache", 29), ("other", 31)):
        path = os.path.join(folder, name)
        open(path, "w").close()
        os.utime(path, (time.time() - days * 86400,) * 2)
    other = home / "another machine" / "c-cache"
    other.parent.mkdir()
    other.touch()
    os.utime(other, (0, 0))
    compilation_cache.use()
    assert sorted(os.listdir(folder)) == ["b-cache", "other"] and not other.exists()


@pytest.mark.slow
def test_a_program_that_was_compiled_is_read(tmp_path):
    program = """
from m3ae_jax import compilation_cache
compilation_cache.use()
import jax, jax.numpy as jnp
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
x = jax.jit(lambda x: jnp.sin(x) @ x.T + jnp.sort(x @ x.T))(jnp.ones((32, 8)))
print(float(x.sum()), "/jax/compilation_cache/cache_hits" in hits)
"""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment.pop(DIR, None)
    runs = [
        subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    (first, hit_first), (second, hit_second) = (run.stdout.split() for run in runs)
    assert first == second and (hit_first, hit_second) == ("False", "True")
