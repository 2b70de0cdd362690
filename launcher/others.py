"""The other machines of a run, seen from one: none, those that come to node 0, or node 0."""

from __future__ import annotations

import queue
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from cluster.errors import ClusterError
from launcher.channel import Line, Meeting, Message, join, take
from launcher.errors import Failure

_FIRST_CAUSE_SECONDS = 1.0


class Ended(Exception):
    """Node 0 wants the attempt to end."""


class Others(Protocol):
    """How one machine of a run hears from the others and tells them something."""

    def message(self, seconds: float) -> tuple[int, Message | None] | None:
        """What comes next, with who says it, None from a node that is gone; None if nothing comes
        within `seconds`."""

    def tell(self, message: Message) -> None:
        """Node 0 tells all others, these tell node 0."""

    def first_cause(self, failure: Failure) -> Failure:
        """What ended the attempt, given what was seen here."""

    def host(self, node_rank: int) -> str:
        """Name of a machine."""


class Alone:
    """There are no others."""

    def message(self, seconds: float) -> None:
        """Nothing, after `seconds`."""
        time.sleep(seconds)

    def tell(self, message: Message) -> None:
        """To nobody."""

    def first_cause(self, failure: Failure) -> Failure:
        """What was seen here."""
        return failure

    def host(self, node_rank: int) -> str:
        """This machine's name."""
        return socket.gethostname()


class Leader:
    """Node 0, to which the others come and which decides for all of them."""

    def __init__(self, address: str, port: int, key: bytes, nnodes: int, own: Message):
        """`own` is node 0's hello. Raises ClusterError if nobody can come there."""
        self._nnodes = nnodes
        self._hellos: dict[int, Message] = {0: own}
        self._lines: dict[int, Line] = {}
        self.ahead: dict[int, float] = {}
        """Seconds by which the clock of a node is ahead of this one's, as it arrived."""
        self._meeting = Meeting(address, port, key, self._objection)

    def gather(self, wait: Callable[[Sequence[int]], None]) -> list[Message]:
        """Every node's hello, in the order of ranks, once all are there.

        `wait` is called with the missing ranks again and again, and ends the wait by raising.
        """
        while missing := [rank for rank in range(1, self._nnodes) if rank not in self._lines]:
            wait(missing)
            self.message(0.5)
        return [self._hellos[rank] for rank in range(self._nnodes)]

    def message(self, seconds: float) -> tuple[int, Message | None] | None:
        """See Others; who arrives or leaves is noted."""
        found = take(self._meeting.inbox, seconds)
        if found is None:
            return None
        node_rank, message = found
        if message is None:
            self._lines.pop(node_rank).close()
        elif "arrived" in message:
            self._lines[node_rank] = message["arrived"]
            self._hellos[node_rank] = message["hello"]
            self.ahead[node_rank] = message["ahead"]
            return self.message(0.0)
        return found

    def tell(self, message: Message) -> None:
        """To all that are there."""
        for line in list(self._lines.values()):
            line.send(message)

    def first_cause(self, failure: Failure) -> Failure:
        """A rank that was killed goes before one that failed, perhaps because of the other."""
        if failure.killed:
            return failure
        deadline = time.monotonic() + _FIRST_CAUSE_SECONDS
        while (left := deadline - time.monotonic()) > 0:
            _, message = self.message(left) or (0, None)
            other = Failure(**message["failure"]) if message and "failure" in message else None
            if other is not None and other.killed:
                return other
        return failure

    def host(self, node_rank: int) -> str:
        """As the node calls itself."""
        return str(self._hellos.get(node_rank, {}).get("host", "unknown"))

    def close(self) -> None:
        """Let all go."""
        self._meeting.close()
        for line in list(self._lines.values()):
            line.close()

    def _objection(self, hello: Message) -> str | None:
        """Why a node cannot take part."""
        own, rank = self._hellos[0], hello.get("node_rank")
        if not isinstance(rank, int) or not 0 < rank < self._nnodes:
            return f"its --node-rank is {rank}, expected 1 to {self._nnodes - 1}"
        if rank in self._lines:
            return f"node {rank} is here already ({self.host(rank)}); give it another --node-rank"
        for key, what in (("nnodes", "--nnodes"), ("device_target", "device target")):
            if hello.get(key) != own[key]:
                return f"its {what} is {hello.get(key)}, node 0's is {own[key]}; use the same"
        if len(hello.get("device_ids", ())) != len(own["device_ids"]):
            return (
                f"it has {len(hello.get('device_ids', ()))} devices, node 0 has "
                f"{len(own['device_ids'])}; give as many on each node with --devices"
            )
        for other, known in self._hellos.items():
            if other != rank and known["host"] == hello.get("host"):
                return (
                    f"it is called {known['host']} like node {other}, and MindSpore gives devices "
                    "out by host name; rename one of them (hostnamectl set-hostname)"
                )
        return None


class Follower:
    """A machine that does what node 0 decides."""

    def __init__(
        self, address: str, port: int, key: bytes, hello: Message, wait: Callable[[], None]
    ):
        """Comes to node 0; see launcher.channel.join. Raises ClusterError if it is refused."""
        self._inbox: queue.Queue[tuple[int, Message | None]] = queue.Queue()
        self._address = address
        self._gone = False
        self._end: Message | None = None
        self._line = join(address, port, key, hello, self._inbox, wait)

    def message(self, seconds: float) -> tuple[int, Message | None] | None:
        """See Others."""
        found = take(self._inbox, seconds)
        if found is not None:
            self._gone |= found[1] is None
            if found[1] and "end" in found[1]:
                self._end = found[1]
        return found

    def order(self, wait: Callable[[], None]) -> Message:
        """The next `start` or `end` that node 0 sends; what else it says is of the past.

        Raises ClusterError if node 0 is gone.
        """
        while not self._gone and self._end is None:
            wait()
            _, message = self.message(0.5) or (0, None)
            if message and "start" in message:
                return message
        if self._end is not None:
            return self._end
        raise ClusterError(
            f"node 0 ({self._address}) is gone; see what it said, and start the nodes again"
        )

    def tell(self, message: Message) -> None:
        """To node 0."""
        self._line.send(message)

    def first_cause(self, failure: Failure) -> Failure:
        """For node 0 to say."""
        return failure

    def host(self, node_rank: int) -> str:
        """Node 0's address."""
        return self._address

    def close(self) -> None:
        """Leave."""
        self._line.close()


def hello(node_rank: int, nnodes: int, **facts: Any) -> Message:
    """What a node says of itself."""
    return {"node_rank": node_rank, "nnodes": nnodes, "host": socket.gethostname(), **facts}
