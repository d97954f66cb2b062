"""Who came, who is missing, who is silent: host 0's view of the others, which are sockets here."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from jaxllm.config import EngineConfig, engine_config_from
from jaxllm.errors import ConfigError, HostError
from jaxllm.execution.batch import StepShape
from jaxllm.execution.commands import RunStep, SleepAt
from jaxllm.execution.compiler import StepCompiler
from jaxllm.execution.hosts import executor, group
from jaxllm.execution.hosts.connect import connected_hosts
from jaxllm.execution.hosts.executor import HostsExecutor
from jaxllm.execution.hosts.group import HostGroup, await_hosts
from jaxllm.execution.hosts.link import connect
from jaxllm.execution.hosts.startup import check_hosts
from jaxllm.execution.hosts.wire import receive, to_frame

SHAPES: list[Any] = []
CONNECTIONS: list[socket.socket] = []


@pytest.fixture(autouse=True)
def close_connections() -> Iterator[None]:
    yield
    while CONNECTIONS:
        CONNECTIONS.pop().close()


class Coming:
    """A host 0 that waits, on a thread."""

    def __init__(
        self, num_hosts: int, timeout: float = 20, check: Callable[[Any], str | None] | None = None
    ) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.group: HostGroup | None = None
        self.error: HostError | None = None
        check = check or (lambda hello: None)
        arguments = (self.listener, num_hosts, timeout, check, {"settings": {"seed": 3}})
        self._thread = threading.Thread(target=self._wait, args=arguments)
        self._thread.start()

    def _wait(self, *arguments: Any) -> None:
        try:
            self.group = await_hosts(*arguments)
        except HostError as error:
            self.error = error

    def join(self) -> HostGroup:
        self._thread.join(20)
        self.listener.close()
        assert self.error is None
        assert self.group is not None
        return self.group

    def join_failed(self) -> str:
        self._thread.join(20)
        self.listener.close()
        return str(self.error)

    def come(self, host: int, **hello: Any) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        CONNECTIONS.append(connection)
        connection.sendall(to_frame({"kind": "hello", "host": host, **hello}))
        return connection


@contextmanager
def two_others() -> Iterator[tuple[HostGroup, list[socket.socket]]]:
    coming = Coming(3)
    others = [coming.come(1), coming.come(2)]
    hosts = coming.join()
    try:
        for other in others:
            assert receive(other).header == {"kind": "welcome", "settings": {"seed": 3}}
        yield hosts, others
    finally:
        hosts.close()
        for other in others:
            other.close()


def next_word(connection: socket.socket) -> dict[str, Any]:
    """The next message that is more than a sign of life."""
    while (header := receive(connection).header)["kind"] == "alive":
        pass
    return header


def wait_for(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_missing_hosts_are_named_and_those_that_came_are_told() -> None:
    coming = Coming(4, timeout=0.5)
    here = coming.come(2)
    error = coming.join_failed()
    assert "host 1, 3 of 4 did not come to 127.0.0.1" in error
    assert next_word(here) == {"kind": "end", "reason": error}


def test_a_host_that_will_not_come_is_not_waited_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(HostError, match="no such node"):
        await_hosts(listener, 2, 60, lambda hello: None, {}, lambda: "no such node")


def test_strangers_and_doubles_do_not_take_a_place() -> None:
    coming = Coming(3)
    first = coming.come(1)
    stranger = socket.create_connection(("127.0.0.1", coming.port))
    stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
    stranger.close()
    assert coming.come(7).recv(1) == b""
    double = coming.come(1)
    assert "host 1 is here already" in next_word(double)["reason"]
    second = coming.come(2)
    hosts = coming.join()
    assert [peer.host for peer in hosts.peers] == [1, 2]
    hosts.close()
    assert next_word(first)["kind"] == next_word(second)["kind"] == "welcome"
    assert next_word(first)["kind"] == next_word(second)["kind"] == "stop"


def test_a_host_that_may_not_take_part_ends_the_start() -> None:
    coming = Coming(3, check=lambda hello: f"host 1 has seed={hello['seed']}" if hello["seed"] else None)
    good, bad = coming.come(2, seed=0), coming.come(1, seed=5)
    assert coming.join_failed() == "host 1 has seed=5"
    assert next_word(good) == next_word(bad) == {"kind": "end", "reason": "host 1 has seed=5"}


def test_hosts_hear_what_all_of_them_say() -> None:
    coming = Coming(2)
    answers: list[Any] = []

    def follow() -> None:
        link = connect("127.0.0.1", coming.port, 1, {}, 20)
        answers.append(link.welcome["settings"])
        answers.append(link.gather("pages", 7))
        link.close()

    other = threading.Thread(target=follow)
    other.start()
    hosts = coming.join()
    assert hosts.gather("pages", 9) == [9, 7]
    other.join(10)
    assert answers == [{"seed": 3}, [9, 7]]
    hosts.close()


def test_who_does_not_come_as_far_is_named() -> None:
    with two_others() as (hosts, others):
        hosts._timeout = 0.5
        others[0].sendall(to_frame({"kind": "value", "name": "ready", "value": 1}))
        with pytest.raises(HostError, match=r"host 2 did not come as far as 'ready' within 0\.5 s"):
            hosts.gather("ready", 1)
        assert "host 2 did not come" in next_word(others[0])["reason"]


def test_a_connection_that_ends_ends_all() -> None:
    with two_others() as (hosts, others):
        heard: list[HostError] = []
        hosts.on_failure(heard.append)
        others[1].close()
        assert hosts.wait_for_failure(10)
        assert "host 2 is gone" in str(hosts.failure)
        assert next_word(others[0])["reason"] == hosts.failure
        wait_for(lambda: bool(heard))
        with pytest.raises(HostError, match="host 2 is gone"):
            hosts.broadcast(b"")
        late: list[HostError] = []
        hosts.on_failure(late.append)
        assert str(late[0]) == str(heard[0]) == hosts.failure


def test_what_a_host_says_of_its_failure_is_told() -> None:
    with two_others() as (hosts, others):
        others[0].sendall(to_frame({"kind": "failed", "reason": "CheckpointError: no weights"}))
        assert hosts.wait_for_failure(10)
        assert hosts.failure == "host 1 failed: CheckpointError: no weights"


def test_a_silent_host_is_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    assert group.SILENCE + group.HEARTBEAT < 30
    monkeypatch.setattr(group, "SILENCE", 1.5)
    monkeypatch.setattr(group, "HEARTBEAT", 0.1)
    with two_others() as (hosts, others):
        hosts.started()
        deadline = time.monotonic() + 20
        while hosts.failure is None and time.monotonic() < deadline:
            others[0].sendall(to_frame({"kind": "alive"}))
            time.sleep(0.05)
        assert "host 2 has not been heard of" in str(hosts.failure)


def test_nobody_waits_to_tell_one_who_does_not_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that is stopped takes nothing in: its connection fills up, and the sender must come free."""
    monkeypatch.setattr(group, "SILENCE", 1.5)
    monkeypatch.setattr(group, "HEARTBEAT", 0.1)
    with two_others() as (hosts, others):
        threading.Thread(target=_keep_saying, args=[others[0], hosts], daemon=True).start()
        hosts.started()
        with pytest.raises(HostError, match="host 2 has not been heard of"):
            for _ in range(1000):
                hosts.broadcast(bytes(1 << 20))


def _keep_saying(connection: socket.socket, hosts: HostGroup) -> None:
    connection.settimeout(0.05)
    while hosts.failure is None:
        try:
            connection.sendall(to_frame({"kind": "alive"}))
            connection.recv(1 << 20)
        except OSError:
            pass


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "HEARTBEAT", 0.05)
    monkeypatch.setattr(executor, "_LATE", 0.3)
    monkeypatch.setattr(executor, "leave_hosts", lambda: None)


class Output:
    """A step's output, in place of arrays."""

    def __init__(self, *token_ids: int) -> None:
        self.token_ids = token_ids


def status(number: int, digest: int = 0, started: int | None = None, ready: tuple[int, ...] = ()) -> bytes:
    told = {"started": number if started is None else started, "done": number}
    return to_frame({"kind": "alive", **told, "digest": digest, "ready": ready})


@pytest.mark.usefixtures("fast")
def test_a_step_is_chosen_once_all_hosts_have_it() -> None:
    shapes = [StepShape(8, 8, 1, True), StepShape(4, 4, 1, True), StepShape(2, 2, 1, True)]
    compiler = StepCompiler(str, shapes, complete=True)
    compiler.wait(progress=False)
    with two_others() as (hosts, others):
        execute = HostsExecutor(lambda command: None, shapes, [[0, 1, 2], [0], [0, 1]], hosts, timeout=30)
        compiler.admits = execute.admits
        assert compiler.choose(2, 2, True) == shapes[0]
        others[0].sendall(status(-1, ready=(0, 1)))
        others[1].sendall(status(-1, ready=(0, 1, 2)))
        wait_for(lambda: compiler.choose(2, 2, True) == shapes[1])
        others[0].sendall(status(-1, ready=(0, 1, 2)))
        wait_for(lambda: compiler.choose(2, 2, True) == shapes[2])
        execute.close()
    compiler.close()


@pytest.mark.usefixtures("fast")
def test_results_come_in_order_and_a_failure_reaches_who_waits() -> None:
    with two_others() as (hosts, others):
        stuck = threading.Event()

        def run(command: Any) -> int:
            if command.level == 5:
                stuck.wait(20)
            return command.level * 10

        execute = HostsExecutor(run, SHAPES, [[], []], hosts, timeout=30)
        waits = [execute.launch(SleepAt(level)) for level in range(6)]
        assert [wait() for wait in waits[:5]] == [0, 10, 20, 30, 40]
        assert [next_word(others[0])["number"] for _ in range(6)] == list(range(6))
        others[1].close()
        started = time.monotonic()
        with pytest.raises(HostError, match="host 2 is gone"):
            waits[5]()
        with pytest.raises(HostError, match="host 2 is gone"):
            execute.launch(SleepAt(1))
        execute.close()
        assert time.monotonic() - started < 5
        stuck.set()


@pytest.mark.usefixtures("fast")
def test_a_host_whose_results_differ_is_out_of_step() -> None:

    shape = StepShape(1, 1, 1, True)
    step = RunStep(shape, np.zeros(shape.num_integers, np.int32), np.zeros(shape.num_floats, np.float32))
    with two_others() as (hosts, others):
        execute = HostsExecutor(lambda command: Output(1, 2), [shape], [[0], [0]], hosts, timeout=30)
        execute.launch(step)()
        digest = execute._digests[0]
        assert digest != 0
        others[0].sendall(status(0, digest))
        assert not hosts.wait_for_failure(0.3)
        others[1].sendall(status(0, digest + 1))
        assert hosts.wait_for_failure(10)
        assert hosts.failure == "host 2 is out of step: its results up to command 0 are others"


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("late", [True, False])
def test_a_command_that_does_not_end_ends_the_hosts(late: bool) -> None:
    stuck = threading.Event()
    with two_others() as (hosts, others):
        execute = HostsExecutor(lambda command: stuck.wait(20), SHAPES, [[], []], hosts, timeout=0.8)
        wait = execute.launch(SleepAt(1))
        others[0].sendall(status(-1, started=0))
        if not late:
            others[1].sendall(status(-1, started=0))
        expected = "host 2 has not begun command 0 within" if late else r"command 0 is not done after 1 s"
        with pytest.raises(HostError, match=expected):
            wait()
        stuck.set()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"nnodes": 0}, "nnodes=0 must be at least 1"),
        ({"node_rank": -1}, "node_rank=-1 must be at least 0"),
        ({"nnodes": 2, "node_rank": 2}, "numbered from 0 to 1"),
        ({"nnodes": 2, "master_port": 65535}, "master_port=65535"),
        ({"nnodes": 2, "distributed_executor_backend": "uni"}, "'uni' is one process"),
        ({"distributed_timeout_seconds": 0}, "distributed_timeout_seconds=0"),
        ({"nnodes": "2"}, "nnodes='2' must be an integer"),
        ({"distributed_executor_backend": "mpi"}, "'uni' or 'mp' or 'ray'"),
    ],
)
def test_what_contradicts_itself_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_hosts(engine_config_from("demo", fields))


def test_the_engine_is_made_on_host_0() -> None:
    config = EngineConfig(nnodes=2, node_rank=1, master_addr="10.0.0.1")
    expected = r"serve --nnodes 2 --node-rank 1 --master-addr 10\.0\.0\.1"
    with pytest.raises(ConfigError, match=expected), connected_hosts(config):
        pass


def test_host_0_listens_where_it_is() -> None:
    config = EngineConfig(nnodes=2, master_addr="192.0.2.1")
    with pytest.raises(ConfigError, match="master_addr is an address of host 0"), connected_hosts(config):
        pass
