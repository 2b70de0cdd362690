"""The line between two launchers: who is let in, what comes, and that an end is noticed."""

from __future__ import annotations

import hmac
import json
import queue
import socket
import time
from collections.abc import Iterator

import pytest

from cluster.errors import ClusterError
from launcher.channel import Meeting, Message, join, take
from launcher.others import Leader
from launcher.others import hello as hello_of

KEY = b"the same config"
SECONDS = 20.0


@pytest.fixture
def meeting() -> Iterator[Meeting]:
    found = Meeting(
        "127.0.0.1", 0, KEY, lambda hello: None if hello["node_rank"] == 1 else "not you"
    )
    yield found
    found.close()


def never() -> None:
    raise AssertionError("nobody should have to wait")


def test_messages_come_in_order_and_the_end_is_noticed(meeting: Meeting) -> None:
    inbox: queue.Queue[tuple[int, Message | None]] = queue.Queue()
    line = join("127.0.0.1", meeting.port, KEY, {"node_rank": 1}, inbox, never)
    arrival = take(meeting.inbox, SECONDS)
    assert arrival is not None and arrival[1] is not None
    other = arrival[1]["arrived"]
    for number in range(100):
        line.send({"number": number})
        other.send({"number": -number})
    for number in range(100):
        assert take(meeting.inbox, SECONDS) == (1, {"number": number})
        assert take(inbox, SECONDS) == (0, {"number": -number})
    line.close()
    assert take(meeting.inbox, SECONDS) == (1, None)
    other.close()


@pytest.mark.parametrize(
    ("key", "rank", "message"),
    [(b"another config", 1, "its config or version is not that"), (KEY, 2, "refuses .*: not you")],
)
def test_who_is_not_let_in(meeting: Meeting, key: bytes, rank: int, message: str) -> None:
    with pytest.raises(ClusterError, match=message):
        join("127.0.0.1", meeting.port, key, {"node_rank": rank}, queue.Queue(), never)
    assert take(meeting.inbox, 0) is None


@pytest.mark.parametrize(
    "said", [b"", b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b'{"hello": 3}\n', b"\xff" * 2_000_000]
)
def test_a_stranger_changes_nothing(meeting: Meeting, said: bytes) -> None:
    with socket.create_connection(("127.0.0.1", meeting.port)) as stranger:
        stranger.settimeout(SECONDS)
        nonce = json.loads(stranger.makefile("rb").readline())["nonce"]
        assert len(nonce) == 32
        try:
            stranger.sendall(said)
            stranger.shutdown(socket.SHUT_WR)
            while stranger.recv(1000):
                pass
        except OSError:
            pass  # cut off while it was still talking
    line = join("127.0.0.1", meeting.port, KEY, {"node_rank": 1}, queue.Queue(), never)
    arrival = take(meeting.inbox, SECONDS)
    assert arrival is not None and arrival[0] == 1
    line.close()


def test_node_0_comes_later() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    waited: list[Meeting] = []

    def wait() -> None:
        waited.append(Meeting("127.0.0.1", port, KEY, lambda _: None))

    line = join("127.0.0.1", port, KEY, {"node_rank": 1}, queue.Queue(), wait)
    assert len(waited) == 1
    line.close()
    waited[0].close()


def test_a_clock_that_is_wrong_is_seen() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    leader = Leader("127.0.0.1", port, KEY, 2, hello_of(0, 2, device_target="CPU", device_ids=[0]))
    said = hello_of(1, 2, device_target="CPU", device_ids=[0])
    said |= {"host": "another", "clock": time.time() - 3600}
    with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as node:
        lines = node.makefile("rb")
        text = json.dumps([json.loads(lines.readline())["nonce"], said], sort_keys=True)
        proof = hmac.new(KEY, text.encode(), "sha256").hexdigest()
        node.sendall(json.dumps({"hello": said, "proof": proof}).encode() + b"\n")
        assert json.loads(lines.readline()) == {"welcome": True}
        assert len(leader.gather(lambda _: None)) == 2
        assert leader.ahead == {1: pytest.approx(-3600, abs=SECONDS)}
    leader.close()


def test_addresses_where_nobody_can_meet(meeting: Meeting) -> None:
    with pytest.raises(ClusterError, match="the nodes cannot meet here: Address already in use"):
        Meeting("127.0.0.1", meeting.port, KEY, lambda _: None)
    with pytest.raises(ClusterError, match="the nodes cannot meet here: "):
        Meeting("192.0.2.1", 0, KEY, lambda _: None)
    with pytest.raises(ClusterError, match="no such host"):
        join("no-such-host.invalid", 1, KEY, {"node_rank": 1}, queue.Queue(), never)
