"""How processes meet: in threads here, each a process of its own in `tests/multiprocess`."""

import socket
import threading
import time

import jax
import pytest

from m3ae_jax.errors import UserError
from m3ae_jax.parallel import processes
from m3ae_jax.parallel.processes import Cluster, meet, start, tells_of_a_loss


@pytest.fixture
def address():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return f"localhost:{probe.getsockname()[1]}"


def all_meet(clusters, delays=None):
    """What each thread got: None, or the error's text."""
    results = {}

    def run(number, cluster):
        time.sleep((delays or {}).get(number, 0))
        try:
            results[number] = meet(cluster)
        except UserError as error:
            results[number] = str(error)

    threads = [threading.Thread(target=run, args=item) for item in enumerate(clusters)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return [results[number] for number in range(len(clusters))]


def test_all_go_on_when_the_last_has_come(address, monkeypatch):
    monkeypatch.setattr(processes, "_RETRY", 0.02)
    clusters = [Cluster(address, 4, index, timeout=30) for index in range(4)]
    assert all_meet(clusters, delays={0: 0.3, 3: 0.5}) == [None] * 4


def test_all_learn_who_is_missing(address, monkeypatch):
    monkeypatch.setattr(processes, "_RETRY", 0.02)
    clusters = [Cluster(address, 4, index, timeout=1) for index in (0, 2)]
    errors = all_meet(clusters, delays={0: 0.5})  # the other's time is over before
    assert errors[0] == errors[1] == f"process 1, 3 of 4 did not come to {address} in 1 s"


def test_without_process_0_the_others_say_so(address, monkeypatch):
    monkeypatch.setattr(processes, "_RETRY", 0.02)
    (error,) = all_meet([Cluster(address, 2, 1, timeout=1)])
    assert f"process 1 did not reach process 0 at {address} in 1 s" in error


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (Cluster(count=4, index=1), "process 1 has --process_count=4, process 0 has 3"),
        (Cluster(count=3, index=2), "two processes have --process_index=2"),
    ],
)
def test_settings_that_differ_are_reported_to_all(address, second, message, monkeypatch):
    monkeypatch.setattr(processes, "_RETRY", 0.02)
    clusters = [Cluster(address, 3, index, timeout=30) for index in (0, 2)]
    errors = all_meet([*clusters, Cluster(address, second.count, second.index, timeout=30)], delays={2: 0.2})
    assert errors == [message] * 3


def test_a_port_in_use_is_reported(address):
    with socket.create_server(("", int(address.rpartition(":")[2]))):
        (error,) = all_meet([Cluster(address, 2, 0, timeout=1)])
    assert "cannot listen there" in error


@pytest.mark.parametrize(
    ("cluster", "message"),
    [
        (Cluster("h:1"), "give all three or none"),
        (Cluster(count=2, index=0), "give all three or none"),
        (Cluster("localhost", 2, 0), "is not HOST:PORT"),
        (Cluster("h:1", 2, 2), "is not below --process_count=2"),
    ],
)
def test_incomplete_settings_are_refused(cluster, message):
    with pytest.raises(UserError, match=message):
        start(cluster)


LOSSES = (
    "UNKNOWN: Gloo all-reduce failed: [external/gloo/gloo/transport/tcp/pair.cc:538] Connection reset by peer",
    "UNAVAILABLE: The coordination service is gone",
    "INTERNAL: NCCL operation ncclGroupEnd() failed: ncclRemoteError",
)


@pytest.mark.parametrize("text", LOSSES)
def test_the_loss_of_another_process_is_recognised_by_its_text_also_of_a_cause(text, monkeypatch):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    assert tells_of_a_loss(jax.errors.JaxRuntimeError(text)) and tells_of_a_loss(ValueError(text))
    outer = KeyError("save")
    outer.__cause__ = RuntimeError(text)
    assert tells_of_a_loss(outer)
    assert not tells_of_a_loss(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"))


def test_one_process_has_none_to_lose():
    assert not tells_of_a_loss(RuntimeError(LOSSES[0]))
