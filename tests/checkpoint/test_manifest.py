"""Damage to any file of a checkpoint is noticed, and what is not whole never counts as a checkpoint."""

import errno
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint.path import atomicity

from m3ae_jax.checkpoint import manifest
from m3ae_jax.checkpoint.init_from import load_into
from m3ae_jax.checkpoint.manager import RETRY_AFTER, Checkpoints, find, load_params
from m3ae_jax.errors import UserError
from m3ae_jax.train.step import TrainState

pytestmark = pytest.mark.usefixtures("short_waits")


def state(step):
    return TrainState(jnp.int32(step), {"layer": {"kernel": jnp.full((2, 3), float(step))}}, (), {})


def abstract():
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(folder, keep=3)
    for step in (1, 2):
        checkpoints.save(state(step), {"step": step}, {"val/loss": 1.0})
    checkpoints.close()
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoints")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES = {"flipped": flip, "truncated": cut, "removed": Path.unlink}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_file_of_the_newest_is_guarded_by_name(folder, damage, caplog):
    files = [p for p in sorted((folder / "2").rglob("*")) if p.is_file()]
    names = {str(p.relative_to(folder / "2")) for p in files}
    assert set(json.loads((folder / "2" / manifest.NAME).read_text())["files"]) == names - {manifest.NAME}
    assert len(names) > 10
    for path in files:
        before, name = path.read_bytes(), str(path.relative_to(folder / "2"))
        DAMAGES[damage](path)
        caplog.clear()
        assert find(str(folder)) == (folder, 1), name
        if (damage, name) != ("removed", manifest.NAME):  # then it is not a checkpoint at all
            (line,) = caplog.messages
            assert f"{folder}/2 is damaged: {name}: " in line and "using step 1" in line
        with pytest.raises(UserError, match=r"/2 is damaged: ") as refusal:
            find(str(folder / "2"))
        assert name in str(refusal.value) and "\n" not in str(refusal.value)
        path.write_bytes(before)
    assert find(str(folder)) == (folder, 2)


def test_every_byte_of_the_manifest_counts(folder):
    path = folder / "2" / manifest.NAME
    content = path.read_bytes()
    for i in range(0, len(content), 7):
        path.write_bytes(content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :])
        assert manifest.problems(folder / "2") == [f"{manifest.NAME}: damaged"], i


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_goes_on_from_the_one_before_and_saves_the_same_step_again(folder, damage, caplog):
    DAMAGES[damage](next((folder / "2" / "state" / "d").iterdir()))
    run = Checkpoints(folder, keep=3)
    assert run.latest() == 1 and run.meta(1) == {"step": 1}
    assert np.array_equal(run.restore(1, abstract()).params["layer"]["kernel"], np.full((2, 3), 1.0))
    assert "is damaged: state/d/" in caplog.text and (folder / "2.damaged").is_dir()
    run.save(state(2), {"step": 2}, {})
    run.close()
    again = Checkpoints(folder, keep=3)
    assert again.latest() == 2 and np.all(again.restore(2, abstract()).params["layer"]["kernel"] == 2.0)
    again.close()


def test_an_extra_file_is_no_damage(folder):
    (folder / "2" / "state" / "notes.txt").write_text("mine")
    assert find(str(folder)) == (folder, 2)


def test_readers_refuse_damage_and_touch_nothing(folder):
    flip(next((folder / "2" / "state" / "d").iterdir()))
    before = sorted(folder.rglob("*"))
    reader = Checkpoints(folder, keep=1, read_only=True)
    assert reader.latest() == 1
    for read in (reader.meta, lambda step: reader.restore(step, abstract())):
        with pytest.raises(UserError, match="2 is damaged: state/d/"):
            read(2)
    reader.close()
    for path in (folder, folder / "2"):  # starting from older weights than were requested would be another run
        with pytest.raises(UserError, match="2 is damaged: state/d/"):
            load_into(state(0).params, str(path))
    assert load_params(str(folder / "1"))["layer"]["kernel"][0, 0] == 1.0
    assert sorted(folder.rglob("*")) == before


def test_when_none_is_left_all_are_named_and_nothing_is_deleted(folder):
    for step in (1, 2):
        (folder / str(step) / "meta" / "metadata").unlink()
    before = sorted(folder.rglob("*"))
    for open_it in (lambda: Checkpoints(folder, keep=2), lambda: find(str(folder))):
        with pytest.raises(UserError) as refusal:
            open_it()
        assert str(refusal.value) == (
            f"no whole checkpoint in {folder}: 2: meta/metadata: missing; 1: meta/metadata: missing"
        )
    assert sorted(folder.rglob("*")) == before


def test_leftovers_are_cleaned_when_training_starts(folder, caplog):
    caplog.set_level("INFO")
    (folder / "2" / manifest.NAME).unlink()  # killed between the renaming and the manifest
    (folder / "3.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    (folder / "0" / "state").mkdir(parents=True)  # killed while deleting an old one
    run = Checkpoints(folder, keep=2)
    assert run.latest() == 1
    run.close()
    assert sorted(p.name for p in folder.iterdir()) == ["1", manifest.RUN]
    for name in ("0", "2", "3.orbax-checkpoint-tmp"):
        assert sum(f"deleting {folder / name}" in message for message in caplog.messages) == 1


def test_checkpoints_of_before_manifests_are_taken_with_one_warning(folder, caplog):
    for step in (1, 2):
        (folder / str(step) / manifest.NAME).unlink()
    for path in (folder, folder / "2"):
        caplog.clear()
        assert find(str(path)) == (folder, 2)
        reader = Checkpoints(folder, keep=1, read_only=True)
        assert reader.meta(2) == {"step": 2}
        reader.close()
        assert caplog.text.count("damage cannot be seen") == 1
    caplog.clear()
    run = Checkpoints(folder, keep=2)
    assert int(run.restore(run.latest(), abstract()).step) == 2
    assert caplog.text.count("damage cannot be seen") == 1
    run.close()
    assert manifest.finished(folder) == [2, 1]  # from here on they are guarded


def full_disk(times):
    """A disk that is full so many times."""
    left = [times]

    def refuse(error):
        left[0] -= 1
        if left[0] >= 0:
            raise error

    return refuse


NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
IN_TENSORSTORE = ValueError("RESOURCE_EXHAUSTED: Failed to write to file 4: ... [os_error_code='28']")


def break_at(monkeypatch, place, times):
    refuse = full_disk(times)
    if place == "manifest":
        write = manifest.write
        monkeypatch.setattr(manifest, "write", lambda checkpoint: (refuse(NO_SPACE), write(checkpoint)))
        return
    method, error = {"create": ("create", NO_SPACE), "tensorstore": ("finalize", IN_TENSORSTORE)}[place]
    real = getattr(atomicity.AtomicRenameTemporaryPath, method)

    async def broken(self):
        refuse(error)
        return await real(self)

    monkeypatch.setattr(atomicity.AtomicRenameTemporaryPath, method, broken)


@pytest.mark.parametrize("place", ["create", "tensorstore", "manifest"])
def test_a_full_disk_is_waited_for(folder, monkeypatch, place, caplog):
    pauses = []
    run = Checkpoints(folder, keep=1, sleep=pauses.append)
    break_at(monkeypatch, place, times=2)
    run.save(state(3), {}, {"val/loss": 0.5})
    run.wait()
    assert pauses == [1.0, 2.0] and "step 3 could not be saved (No space left on device" in caplog.text
    run.close()
    assert manifest.steps(folder) == [3] and manifest.problems(folder / "3") == []


def test_a_disk_that_stays_full_is_one_line_and_the_last_good_one_intact(folder, monkeypatch):
    pauses = []
    run = Checkpoints(folder, keep=1, sleep=pauses.append)
    break_at(monkeypatch, "manifest", times=100)
    run.save(state(3), {}, {"val/loss": 0.5})
    with pytest.raises(UserError, match=r"^step 3 could not .*No space left.*last good checkpoint, step 2, is intact$"):
        run.wait()
    run.close()
    assert pauses == list(RETRY_AFTER)
    assert manifest.steps(folder) == [2, 1] and find(str(folder)) == (folder, 2)


def test_a_save_whose_state_is_gone_is_given_up_for_the_next_one(folder, monkeypatch, caplog):
    run = Checkpoints(folder, keep=1, sleep=lambda seconds: None)
    break_at(monkeypatch, "manifest", times=2)
    lost = state(3)
    run.save(lost, {}, {})
    jax.tree.map(lambda x: x.delete(), lost)  # as the next step does, which donates it
    run.save(state(4), {}, {"val/loss": 0.5})
    assert "saving step 4 instead" in caplog.text
    assert manifest.steps(folder) == [4]  # at once, and tried again
    run.close()


def test_a_lost_save_is_reported_at_the_end(folder, monkeypatch):
    run = Checkpoints(folder, keep=1, sleep=lambda seconds: None)
    break_at(monkeypatch, "manifest", times=1)
    lost = state(3)
    run.save(lost, {}, {})
    jax.tree.map(lambda x: x.delete(), lost)
    with pytest.raises(UserError, match=r"step 3 could not be saved.*step 2, is intact"):
        run.close()


def test_an_error_that_is_not_the_storages_is_raised_as_it_is(folder, monkeypatch):
    run = Checkpoints(folder, keep=1, sleep=lambda seconds: pytest.fail("retried"))
    monkeypatch.setattr(manifest, "write", lambda checkpoint: 1 / 0)
    run.save(state(3), {}, {})
    with pytest.raises(ZeroDivisionError):
        run.close()
