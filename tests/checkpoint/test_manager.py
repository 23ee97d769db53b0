"""Checkpoints survive restarts: the newest and the best are retained, and readers disturb nobody."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3ae_jax.checkpoint import manager
from m3ae_jax.checkpoint.init_from import load_into
from m3ae_jax.checkpoint.manager import Checkpoints, find, load_params
from m3ae_jax.errors import UserError
from m3ae_jax.train.step import TrainState


def state(step):
    params = {"layer": {"kernel": jnp.full((2, 3), float(step)), "bias": jnp.zeros(3)}}
    return TrainState(jnp.int32(step), params, (), {})


def abstract():
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0))


def steps(folder):
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())


def test_the_best_is_retained_over_a_restart(tmp_path):
    first = Checkpoints(tmp_path, keep=2)
    for step, loss in ((1, 9.0), (2, 1.0), (3, 5.0)):
        first.save(state(step), {"step": step}, {"val/loss": loss})
    first.close()
    second = Checkpoints(tmp_path, keep=2)
    for step in (4, 5, 6):
        second.save(state(step), {"step": step}, {} if step == 5 else {"val/loss": 7.0})
    second.wait()
    assert second.best() == 2
    assert second.latest() == 6
    assert second.meta(6) == {"step": 6}
    second.close()
    assert steps(tmp_path) == [2, 5, 6]


def test_the_best_by_a_figure_that_comes_after_the_save(tmp_path):
    name = "retrieval/embedding/image_to_text/recall@1"
    for first in (1, 4):  # over a restart
        run = Checkpoints(tmp_path, keep=1, best=name, greatest=True)
        for step in range(first, first + 3):
            run.save(state(step), {}, {"val/loss": float(step)})
            run.wait()
            run.add_metrics(step, {name: {2: 0.9, 4: 0.5}.get(step, 0.1), "retrieval/pictures": 5.0})
        assert run.best() == 2 and run.is_evaluated(first + 2)
        run.close()
    assert steps(tmp_path) == [2, 6]


def test_all_processes_meet_when_figures_are_added_whichever_of_them_sees_the_file_first(tmp_path, monkeypatch):
    run, met = Checkpoints(tmp_path, keep=1), []
    run.save(state(1), {}, {})
    run.wait()
    run.add_metrics(1, {"val/loss": 1.0})
    monkeypatch.setattr(manager.jax, "process_count", lambda: 2)
    monkeypatch.setattr(manager.multihost_utils, "sync_global_devices", met.append)
    monkeypatch.setattr(run, "_reopen", lambda step: None)
    run.add_metrics(1, {"val/loss": 1.0})  # as a process that comes after process 0 has written
    run.add_metrics(1, {"val/other": 1.0})
    monkeypatch.undo()
    run.close()
    assert met == ["metrics of step 1"]


def test_no_step_is_the_best_without_the_figure(tmp_path):
    run = Checkpoints(tmp_path, keep=1, best="retrieval/x")
    run.save(state(1), {}, {"val/loss": 1.0})
    run.wait()
    assert run.best() is None and run.is_evaluated(1)
    run.close()


def test_restore_find_and_read_only(tmp_path):
    run = tmp_path / "run"
    writer = Checkpoints(run / "checkpoints", keep=3)
    for step in (10, 20):
        writer.save(state(step), {}, {})
    writer.save(state(20), {}, {})  # again: nothing happens
    writer.wait()
    unfinished = run / "checkpoints" / "30.orbax-checkpoint-tmp"
    unfinished.mkdir()
    reader = Checkpoints(run / "checkpoints", keep=1, read_only=True)
    restored = reader.restore(10, abstract())
    assert int(restored.step) == 10
    assert np.array_equal(restored.params["layer"]["kernel"], np.full((2, 3), 10.0))
    reader.close()
    writer.close()
    assert unfinished.exists()
    assert steps(run / "checkpoints") == [10, 20]

    for path in (run, run / "checkpoints"):
        assert find(str(path)) == (run / "checkpoints", 20)
    assert find(str(run / "checkpoints" / "10")) == (run / "checkpoints", 10)
    assert np.array_equal(load_params(str(run / "checkpoints" / "10"))["layer"]["kernel"], np.full((2, 3), 10.0))
    with pytest.raises(UserError, match="no checkpoint at"):
        find(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match=r"^mine=.*: its checkpoint has no 'image', it is of another objective: layer$"):
        load_into(abstract().params, str(run), source="image", field="mine")


def test_another_state_than_the_stored_one_is_named(tmp_path):
    """As after a change of an objective's code, of which the config knows nothing."""
    run = tmp_path / "run"
    writer = Checkpoints(run / "checkpoints", keep=3)
    writer.save(state(10), {}, {})
    writer.wait()
    other = abstract().replace(extra={"queue": jax.ShapeDtypeStruct((4,), jnp.float32)})
    with pytest.raises(UserError, match=r"checkpoints/10 holds another state .*: extra/queue is missing; .*init_from="):
        writer.restore(10, other)
    kernel = jax.ShapeDtypeStruct((2, 4), jnp.float32)
    other = abstract().replace(params={"layer": {"kernel": kernel}})
    with pytest.raises(UserError, match=r"kernel \(2, 3\) instead of \(2, 4\), params/layer/bias is not expected"):
        writer.restore(10, other)
    assert int(writer.restore(10, abstract()).step) == 10
    writer.close()
