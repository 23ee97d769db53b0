"""Several processes as one run: how they meet, and that process 0 alone writes to the console."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import re
import socket
import time
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax._src import distributed  # JAX has no public way to its key-value store
from jax.experimental import multihost_utils

import m3ae_jax.console as console
from m3ae_jax.errors import EverywhereError, UserError
from m3ae_jax.parallel import supervisor
from m3ae_jax.stopping import NOW

log = logging.getLogger("m3ae_jax")

T = TypeVar("T")

_MOST_SAID = 2000  # bytes
_RETRY = 0.5  # seconds between two tries to reach process 0
_FAREWELL = 10.0  # seconds for which process 0 waits for the others, which may take `stopping._PATIENCE` first
_SILENCE = 60  # seconds without a sign of life after which JAX ends those who wait for a process
_LOST = re.compile(r"\bGloo\b|ncclRemoteError|remote process exited|heartbeat|coordination service|Socket closed", re.I)


@dataclasses.dataclass(frozen=True)
class Cluster:
    """How the processes of a run find each other.

    Attributes:
        coordinator: HOST:PORT of process 0; empty: taken from the environment (Cloud TPU, Slurm, Kubernetes, MPI).
        count: processes in all; 0: likewise.
        index: this process, from 0; -1: likewise.
        timeout: seconds until all must be there.
    """

    coordinator: str = ""
    count: int = 0
    index: int = -1
    timeout: int = 300


def start(cluster: Cluster) -> None:
    """Meets the other processes; call once, before anything uses JAX's devices.

    Raises:
        UserError: the settings are incomplete, or the others did not come.
    """
    _check(cluster)
    if cluster.coordinator:
        # JAX ends the process with a stack trace when somebody is missing, and does not say who.
        meet(cluster)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It takes SIGTERM for itself and knows steps alone, not start-up and evaluations: `stopping.Stop` follows it.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            cluster.coordinator or None,
            cluster.count or None,
            cluster.index if cluster.index >= 0 else None,
            initialization_timeout=cluster.timeout,
            heartbeat_timeout_seconds=_SILENCE,
            shutdown_timeout_seconds=_SILENCE,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"--distributed: the processes did not meet ({str(error).splitlines()[0]}); where no cluster says who is "
            "who, give --coordinator=HOST:PORT --process_count=N --process_index=I"
        ) from None
    if jax.process_index() > 0:
        console.only_errors()  # process 0 writes the rest
    log.info("%d processes, %d devices", jax.process_count(), jax.device_count())


class Notices:
    """What the processes of a run let each other know, apart from its computations (`stopping.Fellows`)."""

    def __init__(self) -> None:
        self._client: Any = distributed.global_state.client
        self._index, self._count = jax.process_index(), jax.process_count()

    def ask_to_stop(self) -> None:
        """See `stopping.Fellows`."""
        self._post("stop", "")

    def asked_to_stop(self) -> bool:
        """See `stopping.Fellows`."""
        return self._get("stop") is not None

    def agree(self, boundary: int) -> int:
        """See `stopping.Fellows`; `NOW` too if one does not say anything."""
        self._post(f"boundary/{self._index}", str(boundary))
        said = [self._get(f"boundary/{number}", _SILENCE) for number in range(self._count)]
        boundaries = [NOW if text is None else int(text) for text in said]
        return NOW if NOW in boundaries else max(boundaries)

    def fail(self, code: int, line: str) -> None:
        """See `stopping.Fellows`; only the first one counts."""
        self._post("failure", json.dumps({"code": code, "line": f"error: process {self._index}: {line}"}))

    def failure(self) -> tuple[int, str] | None:
        """See `stopping.Fellows`."""
        text = self._get("failure")
        if text is None:
            return None
        said = json.loads(text)
        return said["code"], said["line"]

    def depart(self, code: int) -> None:
        """See `stopping.Fellows`."""
        supervisor.announce(code)
        self._post(f"departed/{self._index}", "")
        deadline = time.monotonic() + _FAREWELL
        for number in range(self._count if self._index == 0 else 0):
            self._get(f"departed/{number}", max(deadline - time.monotonic(), 0.01))

    def _post(self, name: str, text: str) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # there already, or process 0 is gone
            self._client.key_value_set(f"m3ae_jax/{name}", text)

    def _get(self, name: str, seconds: float = 0.0) -> str | None:
        key = f"m3ae_jax/{name}"
        try:
            if seconds:
                return str(self._client.blocking_key_value_get(key, int(1000 * seconds)))
            return str(self._client.key_value_try_get(key))
        except jax.errors.JaxRuntimeError:  # not there, or process 0 is gone
            return None


def in_all(make: Callable[[], T], *, first_alone: bool = False) -> T:
    """What `make` returns; where it fails in one process, all raise that one's error.

    Args:
        make: called by each process.
        first_alone: by process 0 first and, once it has returned there, by the others.

    Raises:
        UserError: as `make`.
    """
    if jax.process_count() == 1:
        return make()
    result, trouble = None, ""
    for turn in (True, False) if first_alone else (None,):
        if turn is None or turn == (jax.process_index() == 0):
            try:
                result = make()
            except UserError as error:
                trouble = str(error) or "failed"
        for number, said in enumerate(all_say(trouble)):
            if said:
                raise EverywhereError(said if number == jax.process_index() else f"process {number}: {said}")
    return cast(T, result)


def check_equal(name: str, value: str) -> None:
    """Refuses a run whose processes do not see the same.

    Args:
        name: what it is of, for the message.
        value: this process's, for people.

    Raises:
        UserError: another process has another value.
    """
    said = all_say(value) if jax.process_count() > 1 else [value]
    if other := next((number for number, one in enumerate(said) if one != said[0]), 0):
        raise EverywhereError(
            f"{name} differs between the processes: process 0 has {said[0]}, process {other} {said[other]}"
        )


def all_say(text: str) -> list[str]:
    """What each process says, at most `_MOST_SAID` bytes."""
    said = np.zeros(_MOST_SAID, np.uint8)
    encoded = np.frombuffer(text.encode("utf-8", "backslashreplace")[:_MOST_SAID], np.uint8)
    said[: len(encoded)] = encoded
    gathered = np.asarray(multihost_utils.process_allgather(said))
    return [row.tobytes().rstrip(b"\0").decode("utf-8", "ignore") for row in gathered]


def tells_of_a_loss(error: BaseException | None) -> bool:
    """Whether an error of a computation over all processes says that another one is gone."""
    if not jax.distributed.is_initialized():
        return False
    while error is not None:
        # The class says nothing: the same failure is a JaxRuntimeError when waited for, a ValueError when dispatched.
        if isinstance(error, (RuntimeError, ValueError)) and _LOST.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _check(cluster: Cluster) -> None:
    given = [bool(cluster.coordinator), cluster.count > 0, cluster.index >= 0]
    if any(given) and not all(given):
        raise UserError(
            f"--coordinator={cluster.coordinator!r} --process_count={cluster.count} --process_index={cluster.index}: "
            "give all three or none"
        )
    if not any(given):
        return
    host, _, port = cluster.coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--coordinator={cluster.coordinator!r} is not HOST:PORT")
    if cluster.index >= cluster.count:
        raise UserError(
            f"--process_index={cluster.index} is not below --process_count={cluster.count}: they count from 0"
        )


def meet(cluster: Cluster) -> None:
    """Returns when all processes have called it; process 0 listens, the others knock until it does.

    Raises:
        UserError: somebody did not come within the time, or came with other settings; it says who.
    """
    host, _, port = cluster.coordinator.rpartition(":")
    deadline = time.monotonic() + cluster.timeout
    answer = _knock(cluster, host, int(port), deadline) if cluster.index else _receive(cluster, int(port), deadline)
    if answer != "go":
        raise UserError(answer)


def _receive(cluster: Cluster, port: int, deadline: float) -> str:
    """Process 0: collects one line ``INDEX COUNT`` from each other process, then answers ``go`` or what is wrong."""
    visitors: list[socket.socket] = []
    came: set[int] = set()
    answer = "go"
    try:
        with contextlib.closing(socket.create_server(("", port))) as server:
            while len(came) < cluster.count - 1 and answer == "go":
                server.settimeout(max(deadline - time.monotonic(), 0.001))
                visitor, _ = server.accept()
                visitors.append(visitor)
                visitor.settimeout(max(deadline - time.monotonic(), 0.001))
                index, count = map(int, visitor.makefile().readline().split())
                if count != cluster.count:
                    answer = f"process {index} has --process_count={count}, process 0 has {cluster.count}"
                elif index in came:
                    answer = f"two processes have --process_index={index}"
                came.add(index)
    except TimeoutError:
        missing = ", ".join(str(i) for i in range(1, cluster.count) if i not in came)
        answer = f"process {missing} of {cluster.count} did not come to {cluster.coordinator} in {cluster.timeout} s"
    except OSError as error:
        raise UserError(f"--coordinator={cluster.coordinator!r}: cannot listen there: {error.strerror}") from None
    for visitor in visitors:
        with contextlib.closing(visitor), contextlib.suppress(OSError):
            visitor.sendall(f"{answer}\n".encode())
            visitor.recv(1)  # its end first, so that JAX can take the port at once
    return answer


def _knock(cluster: Cluster, host: str, port: int, deadline: float) -> str:
    """Another process: says who it is, again and again until process 0 is there, and returns its answer."""
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((host, port), timeout=max(deadline - time.monotonic(), 0.001)) as server:
                server.sendall(f"{cluster.index} {cluster.count}\n".encode())
                # Process 0 is there and answers when its own time is over, which may have begun later.
                server.settimeout(2 * cluster.timeout)
                if answer := server.makefile().readline().strip():
                    return answer
        except OSError as error:
            log.debug("process 0 is not there yet: %s", error)
        time.sleep(_RETRY)
    return (
        f"process {cluster.index} did not reach process 0 at {cluster.coordinator} in {cluster.timeout} s: was it "
        "started there, and can this machine reach that port?"
    )
