"""A stall is told once with the stacks of all threads, then ends the process; nothing else does."""

import logging
import threading

import pytest

from m3ae_jax.train.watchdog import Watchdog, stacks


class Result:
    def __init__(self):
        self.ready = False

    def is_ready(self):
        return self.ready


class Scene:
    """A watchdog with a clock of its own; the thread is not started, so that looks are counted."""

    def __init__(self, report_after=10.0, stop_after=100.0):
        self.now, self.ended = 0.0, 0
        self.watchdog = Watchdog(report_after, stop_after, clock=lambda: self.now, end=self.end)

    def end(self):
        self.ended += 1

    def wait(self, seconds):
        self.now += seconds
        self.watchdog.look()


@pytest.fixture
def told(caplog):
    caplog.set_level(logging.ERROR, "m3ae_jax")
    logging.getLogger("m3ae_jax").propagate = True
    return caplog


def test_a_stall_is_told_once_with_all_stacks(told):
    scene = Scene()
    result = Result()
    scene.watchdog.stage("running steps")
    scene.watchdog.started(7, result)
    scene.watchdog.started(8, Result())
    result.ready = True
    scene.wait(9)
    assert not told.records  # step 7 was completed
    scene.wait(11)
    scene.wait(11)
    (record,) = told.records
    assert "nothing has been done for 11 s; last completed: step 7; now: running steps" in record.getMessage()
    assert "test_a_stall_is_told_once" in record.getMessage() and "MainThread" in record.getMessage()
    assert record.kind == "stalled" and "\n" not in record.brief
    assert not scene.ended


def test_after_progress_the_next_stall_is_told_again(told):
    scene = Scene()
    scene.wait(11)
    scene.watchdog.stage("saving")
    scene.wait(11)
    assert len(told.records) == 2 and "none yet" in told.messages[0]


def test_a_longer_stall_ends_the_process(told):
    scene = Scene(report_after=0.0)
    scene.wait(99)
    assert not scene.ended and not told.records
    scene.wait(2)
    assert scene.ended == 1 and "the same command goes on" in told.messages[0]


def test_a_patient_stage_is_told_of_and_not_ended(told):
    scene = Scene()
    scene.watchdog.stage("evaluating", patient=True)
    scene.wait(1000)
    assert not scene.ended and len(told.records) == 1
    scene.watchdog.stage("running steps")
    scene.wait(101)
    assert scene.ended == 1


def test_without_times_there_is_no_dog(told):
    scene = Scene(0.0, 0.0)
    scene.wait(1e9)
    assert not scene.ended and not told.records


def test_the_thread_looks_by_itself_and_ends_with_the_context(told):
    ended = threading.Event()
    with Watchdog(0.02, 0.05, end=ended.set) as watchdog:
        watchdog.stage("hanging")
        assert ended.wait(30)
    assert not any(thread.name == "watchdog" for thread in threading.enumerate())
    assert any("hanging" in message for message in told.messages)


def test_stacks_name_the_threads():
    go = threading.Event()
    thread = threading.Thread(target=go.wait, name="a name of its own")
    thread.start()
    try:
        assert "thread a name of its own:" in stacks()
    finally:
        go.set()
        thread.join()
