"""Small files that are damaged, checkpoints in the wrong place, and those of other programs: one line each."""

import json
import shutil

import jax
import jax.numpy as jnp
import pytest

from m3ae_jax import config as config_lib
from m3ae_jax.checkpoint import manifest, meta
from m3ae_jax.checkpoint.init_from import load_into
from m3ae_jax.checkpoint.manager import Checkpoints, find, load_params
from m3ae_jax.errors import UserError
from m3ae_jax.train.step import TrainState

KEPT = (1, 2, 3)


def state(step):
    return TrainState(jnp.int32(step), {"layer": {"kernel": jnp.full((2, 3), float(step))}}, (), {})


def abstract():
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0))


def save(folder, steps=KEPT):
    checkpoints = Checkpoints(folder, keep=9)
    for step in steps:
        checkpoints.save(state(step), {"step": step, "config": {"seed": 7}}, {"val/loss": float(step)})
    checkpoints.close()
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two runs with the same steps."""
    root = tmp_path_factory.mktemp("saved")
    return {run: save(root / run / "checkpoints") for run in "ab"}


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved["a"], tmp_path / "a" / "checkpoints")


@pytest.fixture
def other(saved, tmp_path):
    return shutil.copytree(saved["b"], tmp_path / "b" / "checkpoints")


SMALL = ("metrics/metrics", "meta/metadata", "_CHECKPOINT_METADATA", "state/_METADATA", "state/manifest.ocdbt")
DAMAGES = {"empty": b"", "cut": b'{"val/lo', "null": b"null", "list": b"[1]", "binary": bytes(range(128, 256))}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", SMALL)
def test_item_1_a_small_file_of_an_older_checkpoint_stops_nobody(folder, name, damage, caplog):
    (folder / "2" / name).write_bytes(DAMAGES[damage])
    assert find(str(folder)) == (folder, 3)
    reader = Checkpoints(folder, keep=1, read_only=True)
    assert reader.latest() == 3 and reader.meta(3)["step"] == 3
    assert int(reader.restore(3, abstract()).step) == 3
    assert load_params(str(folder))["layer"]["kernel"][0, 0] == 3.0
    assert manifest.steps(folder) == [3, 2, 1] and not [one for one in caplog.records if one.name == "m3ae_jax"]
    run = Checkpoints(folder, keep=9)
    assert run.latest() == 3 and run.best() == 1
    told = [message for message in caplog.messages if "is damaged" in message]
    assert len(told) == 1 and f"{folder / '2'} is damaged: {name}: " in told[0]
    run.save(state(4), {}, {"val/loss": 0.5})
    run.close()
    assert manifest.steps(folder) == [4, 3, 1] and (folder / "2.damaged" / name).exists()


def test_item_1_the_best_one_may_be_damaged(folder):
    (folder / "1" / "metrics" / "metrics").write_bytes(b"")
    run = Checkpoints(folder, keep=1)
    assert run.best() == 2
    run.save(state(4), {}, {"val/loss": 9.0})
    run.close()
    assert manifest.steps(folder) == [4, 2]


def test_item_1_nothing_that_was_set_aside_is_overwritten(folder):
    for name in ("2.damaged", "2.damaged.2"):
        (folder / name).mkdir()
        (folder / name / "mine").touch()
    (folder / "2" / "metrics" / "metrics").write_bytes(b"")
    Checkpoints(folder, keep=9).close()
    assert (folder / "2.damaged" / "mine").exists() and (folder / "2.damaged.2" / "mine").exists()
    assert (folder / "2.damaged.3" / "meta").is_dir()


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["metrics/metrics", "meta/metadata"])
def test_item_1_without_manifests_what_cannot_be_parsed_is_passed_over(folder, name, damage):
    for step in KEPT:
        (folder / str(step) / manifest.NAME).unlink()
    (folder / "3" / name).write_bytes(DAMAGES[damage])
    assert find(str(folder)) == (folder, 2)
    with pytest.raises(UserError, match=f"3 is damaged: {name}"):
        find(str(folder / "3"))
    run = Checkpoints(folder, keep=9)
    assert run.latest() == 2
    run.close()
    assert (folder / "3.damaged").is_dir() and manifest.finished(folder) == [2, 1]


def test_item_1_without_a_manifest_damage_to_the_state_is_one_line(folder):
    for step in KEPT:
        (folder / str(step) / manifest.NAME).unlink()
    (folder / "3" / "state" / "_METADATA").write_bytes(b"{")
    with pytest.raises(UserError, match=r"3 is damaged \(checksums.json: missing\)") as refusal:
        load_params(str(folder))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("content", [b"", b"null", b"[]", b"\xff\xfe", b"ab" * 3])
def test_item_1_a_damaged_run_id_is_made_anew_from_the_manifests(folder, content):
    before = manifest.run_of(folder)
    (folder / manifest.RUN).write_bytes(content)
    assert find(str(folder)) == (folder, 3)
    Checkpoints(folder, keep=9).close()
    assert manifest.run_of(folder) == before and manifest.steps(folder) == [3, 2, 1]


def test_item_2_a_renamed_or_copied_checkpoint_is_named_and_not_taken(folder, caplog):
    shutil.copytree(folder / "1", folder / "9")
    (folder / "2").rename(folder / "8")
    for step, real in ((9, 1), (8, 2)):
        for read in (find, load_params, lambda path: load_into(state(0).params, path)):
            with pytest.raises(UserError, match=f"/{step} .*it is the checkpoint of step {real}, .* renamed or copied"):
                read(str(folder / str(step)))
    caplog.clear()
    assert find(str(folder)) == (folder, 3)
    assert [m for m in caplog.messages if "step 1, and its folder" in m] and "using step 3" in caplog.text
    run = Checkpoints(folder, keep=9)
    assert run.latest() == 3
    run.close()
    assert manifest.steps(folder) == [3, 1]
    assert (folder / "9.damaged").is_dir() and (folder / "8.damaged").is_dir()


@pytest.mark.parametrize("step", [1, 3])
def test_item_2_a_checkpoint_of_another_run_is_named_and_not_taken(folder, other, step, caplog):
    shutil.rmtree(folder / str(step))
    shutil.copytree(other / str(step), folder / str(step))
    with pytest.raises(UserError, match=rf"/{step} .*of another run \(\w+; here is {manifest.run_of(folder)[:8]}\)"):
        load_params(str(folder / str(step)))
    newest = 2 if step == 3 else 3
    assert find(str(folder)) == (folder, newest)
    run = Checkpoints(folder, keep=9)
    assert run.latest() == newest
    run.close()
    assert (folder / f"{step}.damaged").is_dir() and "of another run" in caplog.text


def test_item_2_a_run_or_a_checkpoint_may_be_copied_elsewhere(folder, tmp_path):
    whole = shutil.copytree(folder.parent, tmp_path / "copy")
    assert find(str(whole))[1] == 3
    run = Checkpoints(whole / "checkpoints", keep=9)
    assert run.latest() == 3
    run.close()
    alone = shutil.copytree(folder / "1", tmp_path / "elsewhere" / "1")
    assert find(str(alone)) == (alone.parent, 1)
    assert load_params(str(alone))["layer"]["kernel"][0, 0] == 1.0
    shutil.copytree(folder / "1", tmp_path / "elsewhere" / "5")
    with pytest.raises(UserError, match="checkpoint of step 1"):
        find(str(tmp_path / "elsewhere" / "5"))


def test_item_2_the_manifests_own_sum_covers_step_and_run(folder, other):
    path = folder / "3" / manifest.NAME
    stored = json.loads(path.read_text())
    assert stored["step"] == 3 and stored["run"] == manifest.run_of(folder) != manifest.run_of(other)
    for change in ({"step": 2}, {"run": manifest.run_of(other)}):
        path.write_text(json.dumps(stored | change, indent=1, sort_keys=True) + "\n")
        assert manifest.problems(folder / "3") == [f"{manifest.NAME}: damaged"]


def format_1(folder):
    """Makes the manifests what they were before they knew step and run."""
    for step in manifest.steps(folder):
        path = folder / str(step) / manifest.NAME
        path.write_text(manifest._text_of_format_1(json.loads(path.read_text())["files"]))
    (folder / manifest.RUN).unlink()


def test_item_2_earlier_manifests_are_taken_and_get_step_and_run(folder, caplog):
    caplog.set_level("INFO")
    format_1(folder)
    assert find(str(folder)) == (folder, 3) and find(str(folder / "1")) == (folder, 1)
    run = Checkpoints(folder, keep=9)
    assert run.latest() == 3 and int(run.restore(3, abstract()).step) == 3
    run.close()
    assert sum("now say step and run: [3, 2, 1]" in message for message in caplog.messages) == 1
    ids = {json.loads((folder / str(step) / manifest.NAME).read_text())["run"] for step in KEPT}
    assert ids == {manifest.run_of(folder)}
    caplog.clear()
    Checkpoints(folder, keep=9).close()
    assert "say step and run" not in caplog.text


@pytest.mark.parametrize("manifests", ["earlier", "none"])
def test_item_2_the_state_itself_tells_its_step_where_no_manifest_does(folder, manifests):
    format_1(folder)
    if manifests == "none":
        for step in KEPT:
            (folder / str(step) / manifest.NAME).unlink()
    (folder / "3").rename(folder / "5")
    for read in (load_params, lambda path: Checkpoints(path, keep=1, read_only=True).restore(5, abstract())):
        with pytest.raises(UserError, match="5 is of step 3: its folder was renamed or copied; name it 3"):
            read(str(folder))


def test_item_6_a_newer_programs_checkpoint_is_refused_and_stays(folder, monkeypatch):
    with monkeypatch.context() as newer:
        newer.setattr(manifest, "FORMAT", manifest.FORMAT + 1)
        manifest.write(folder / "3")
    before = sorted(folder.rglob("*"))
    for read in (find, load_params, lambda path: Checkpoints(path, keep=9)):
        with pytest.raises(UserError, match=r"3 was made by a newer program .*format 8, .*update m3ae_jax"):
            read(str(folder))
    assert sorted(folder.rglob("*")) == before


def test_item_6_a_newer_state_is_refused_and_an_older_one_only_as_weights(folder):
    for version, match in (
        (99, "newer program .*update m3ae_jax"),
        (2, "weights alone .*init_from"),
        (None, "init_from"),
    ):
        with pytest.raises(UserError, match=match):
            meta.check_version({"state_version": version}, folder / "3")
    (folder / "3" / meta.FILE).write_text(json.dumps({"state_version": 99}))
    manifest.write(folder / "3")
    with pytest.raises(UserError, match="3 was made by a newer program"):
        load_params(str(folder))


@pytest.mark.parametrize("name", ["²", "٣", "007", "1²", "-1", "99999999999999999999"])
def test_item_6_a_folder_whose_name_is_no_step_is_no_checkpoint(folder, name):
    shutil.copytree(folder / "1", folder / name)
    assert manifest.steps(folder) == [3, 2, 1] and find(str(folder)) == (folder, 3)
    with pytest.raises(UserError, match="no checkpoint at"):
        find(str(folder / name))
    run = Checkpoints(folder, keep=9)
    assert run.latest() == 3
    run.save(state(4), {}, {"val/loss": 9.0})
    run.close()
    assert manifest.steps(folder) == [4, 3, 2, 1]


def test_item_6_a_missing_manifest_is_told(folder, caplog):
    (folder / "3" / manifest.NAME).unlink()
    for read in (find, load_params, lambda path: Checkpoints(path, keep=1, read_only=True).latest()):
        caplog.clear()
        read(str(folder))
        (line,) = caplog.messages
        assert f"{folder / '3'} has no {manifest.NAME}: " in line and "using step 2" in line
    with pytest.raises(
        UserError, match=rf"3 is damaged: {manifest.NAME}: missing \(it was never finished, or the file"
    ):
        find(str(folder / "3"))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({}, "has no 'config'"),
        ({"config": []}, "config=.* not of type dict"),
        ({"config": {}, "modalities": 3}, "modalities=3, not of type list"),
        ({"config": {}, "modalities": [{"name": "text"}]}, "a modality without a vocabulary"),
        ({"config": {}, "modalities": [None]}, "a modality without a vocabulary"),
    ],
)
def test_item_6_fields_that_are_missing_are_named(content, match):
    with pytest.raises(UserError, match=match) as refusal:
        meta.config_of(content, "checkpoint 3")
        meta.vocabulary(content, "checkpoint 3")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("content", [b"", b'{"seed": 4', b"null", b"[]", b"\xff\xfe\x00", None])
def test_item_5_a_damaged_config_is_taken_from_the_newest_checkpoint(folder, content, caplog):
    file = folder.parent / "config.json"
    if content is not None:
        file.write_bytes(content)
    (folder / "3" / "metrics" / "metrics").write_bytes(b"")  # and that one is damaged, too
    assert config_lib.load(str(file)).seed == 7
    (line,) = caplog.messages
    assert str(file) in line and str(folder / "2") in line


def test_item_5_without_a_checkpoint_a_damaged_config_is_one_line(tmp_path):
    file = tmp_path / "config.json"
    file.write_text('{"seed": 4')
    with pytest.raises(UserError, match=r"config\.json is damaged: not JSON: .*there is no checkpoint") as refusal:
        config_lib.load(str(file))
    assert str(file) in str(refusal.value)


@pytest.mark.parametrize("gone", ["deleted", "replaced"])
def test_item_5_a_folder_that_is_deleted_while_the_run_goes_on_is_not_made_again(folder, other, gone):
    run = Checkpoints(folder, keep=9)
    shutil.rmtree(folder.parent)
    if gone == "replaced":
        shutil.copytree(other, folder)
    with pytest.raises(UserError, match="was deleted or replaced while the run went on"):
        run.save(state(4), {}, {})
    run.close()
    assert folder.exists() == (gone == "replaced") and not (folder / "4").exists()


def test_item_5_a_run_without_a_checkpoint_notices_that_another_takes_its_place(tmp_path, other):
    # It took the other's number for its own, and wrote its checkpoints among the other's.
    folder = tmp_path / "fresh" / "checkpoints"
    run = Checkpoints(folder, keep=9)
    shutil.rmtree(folder)
    shutil.copytree(other, folder)
    with pytest.raises(UserError, match="was deleted or replaced while the run went on"):
        run.save(state(9), {}, {})
    run.close()
    assert not (folder / "9").exists()
