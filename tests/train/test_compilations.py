"""After the first steps nothing is compiled any more, and between log lines the program waits for no step."""

import logging

import jax
import pytest

from m3ae_jax.evals.run import train_and_evaluate
from m3ae_jax.metrics.writers import read_rows
from m3ae_jax.parallel.mesh import make_mesh
from m3ae_jax.train import setup
from m3ae_jax.train.watchdog import Watchdog
from tests.train.test_loop import shrunk

pytestmark = pytest.mark.slow

COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(setup, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))


@pytest.fixture
def captions(tmp_path):
    """A few words, and many: all lengths in one file."""
    path = tmp_path / "captions.txt"
    lines = ["a red circle " * (1 if i % 3 else 40) for i in range(200)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


@pytest.fixture
def told():
    """What happens in a run, in order: programs that are compiled, and lines that are logged."""
    events = []

    class Lines(logging.Handler):
        def emit(self, record):
            events.append(record.getMessage())

    def compiled(name, seconds, **about):
        if name == COMPILED:
            events.append(("compiled", about.get("fun_name")))

    handler, log = Lines(), logging.getLogger("m3ae_jax")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    jax.monitoring.register_event_duration_secs_listener(compiled)
    yield events
    log.removeHandler(handler)
    jax.monitoring.unregister_event_duration_listener(compiled)


def after(events, start):
    """The programs that were compiled after the line that starts so."""
    (place,) = (i for i, event in enumerate(events) if isinstance(event, str) and event.startswith(start))
    return [event for event in events[place:] if isinstance(event, tuple)]


@pytest.mark.parametrize("config", ["configs/tiny.py", "configs/mixture.py"])
def test_nothing_is_compiled_after_the_first_steps(config, captions, tmp_path, told):
    changes = {"duration": "8 steps", "eval.every": "2 steps", "checkpoint.every": "4 steps"}
    if config == "configs/tiny.py":
        changes |= {"data.modalities": ("text",), "data.train.source": "text", "data.train.path": captions}
        changes |= {"data.val.source": "text", "data.val.path": captions, "eval.pictures": 0}
    train_and_evaluate(shrunk(config, **changes), tmp_path / "run")
    assert after(told, "compiling the step")  # the step itself
    # Two log lines and an evaluation later all that a run does has been done once.
    assert after(told, "step 3/8") == []


def test_no_step_is_waited_for_between_log_lines(tmp_path, monkeypatch):
    array = type(jax.numpy.ones(1))
    value, read = array._value, []
    stage, started = Watchdog.stage, Watchdog.started
    now = {"stage": ""}

    def looked(self):
        read.append(now["stage"])
        return value.fget(self)

    def at(self, name, **options):
        now["stage"] = name
        return stage(self, name, **options)

    def goes_on(self, step, loss):
        now["stage"] = "between"
        return started(self, step, loss)

    def waited(self):
        read.append(now["stage"])
        return wait(self)

    wait = array.block_until_ready
    monkeypatch.setattr(array, "_value", property(looked))
    monkeypatch.setattr(array, "block_until_ready", waited)
    monkeypatch.setattr(jax, "block_until_ready", lambda tree: jax.tree.map(waited, tree))
    monkeypatch.setattr(Watchdog, "stage", at)
    monkeypatch.setattr(Watchdog, "started", goes_on)
    monkeypatch.setattr(Watchdog, "look", lambda self: None)  # a thread of its own, which may wait
    changes = {"duration": "9 steps", "log_every": "4 steps", "checkpoint.every": "100 steps"}
    train_and_evaluate(shrunk(**changes), tmp_path)
    assert {row["step"] for row in read_rows(tmp_path) if "train/loss" in row} == {1, 4, 8, 9}
    assert any(name.startswith("waiting for step") for name in read)  # what is logged is read
    assert not {"waiting for data", "running steps", "between"} & set(read)
