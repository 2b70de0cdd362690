"""The line between the launchers of a run's nodes: JSON, one message a line, over TCP.

Node 0 listens where the nodes meet (--master-addr and --master-port), and the others come. Who
knows the run's config can prove it and is let in; nothing that is sent is secret. Both ends write a
line every other second, so that a machine that is gone is missed soon.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from cluster.errors import ClusterError

Message = dict[str, Any]

_SILENT_SECONDS = 10.0
_PING_SECONDS = 2.0
_MOST_BYTES = 1 << 20


class Line:
    """A connection. What comes is put into `inbox` with the other node's rank, None at its end."""

    def __init__(
        self,
        connection: socket.socket,
        node_rank: int,
        inbox: queue.Queue[tuple[int, Message | None]],
    ):
        connection.settimeout(_SILENT_SECONDS)
        self.node_rank = node_rank
        self._socket = connection
        self._reader = connection.makefile("rb")
        self._inbox = inbox
        self._sending = threading.Lock()
        self._closed = threading.Event()

    def begin(self) -> None:
        """Read and give signs of life from now on."""
        for work in (self._read, self._ping):
            threading.Thread(target=work, daemon=True).start()

    def send(self, message: Message) -> None:
        """Send; if the other end is gone, what it means comes through the inbox."""
        with contextlib.suppress(OSError), self._sending:
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> Message | None:
        """The next message; None if the other end is gone, silent, or talks something else."""
        try:
            line = self._reader.readline(_MOST_BYTES)
            message = json.loads(line) if line.endswith(b"\n") else None
        except (OSError, ValueError):
            return None
        return message if isinstance(message, dict) else None

    def close(self) -> None:
        """End the connection, after what was sent."""
        self._closed.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
        self._socket.close()

    def _read(self) -> None:
        while (message := self.receive()) is not None:
            if message:
                self._inbox.put((self.node_rank, message))
        self._inbox.put((self.node_rank, None))

    def _ping(self) -> None:
        while not self._closed.wait(_PING_SECONDS):
            self.send({})


class Meeting:
    """Where node 0 receives the others.

    `admit` gets the hello of a node and gives the reason why it cannot take part, None if it can.
    """

    def __init__(self, address: str, port: int, key: bytes, admit: Callable[[Message], str | None]):
        """Raises ClusterError if nobody can listen there."""
        self.inbox: queue.Queue[tuple[int, Message | None]] = queue.Queue()
        self._key = key
        self._admit = admit
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            self._listener = socket.create_server((address, port), family=family)
        except OSError as error:
            raise ClusterError(
                f"{address} port {port}: the nodes cannot meet here: {error.strerror}; give an "
                "address of this machine as --master-addr and a free port as --master-port"
            ) from error
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._listener.getsockname()[1])

    def close(self) -> None:
        """Receive nobody any more."""
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._receive, args=(connection,), daemon=True).start()

    def _receive(self, connection: socket.socket) -> None:
        line = Line(connection, -1, self.inbox)
        nonce = secrets.token_hex(16)
        line.send({"nonce": nonce})
        answer = line.receive() or {}
        hello = answer.get("hello")
        if not isinstance(hello, dict) or not hmac.compare_digest(
            str(answer.get("proof")), _proof(self._key, nonce, hello)
        ):
            line.send({"refused": "its config or version is not that of node 0; use the same"})
            line.close()
        elif reason := self._admit(hello):
            line.send({"refused": reason})
            line.close()
        else:
            line.node_rank = hello["node_rank"]
            line.send({"welcome": True})
            ahead = float(hello["clock"]) - time.time()
            self.inbox.put((line.node_rank, {"arrived": line, "hello": hello, "ahead": ahead}))
            line.begin()


def join(
    address: str,
    port: int,
    key: bytes,
    hello: Message,
    inbox: queue.Queue[tuple[int, Message | None]],
    wait: Callable[[], None],
) -> Line:
    """The line to node 0, when it is there; `wait` is called between two tries, and ends them.

    Raises ClusterError if node 0 refuses this node or its address is none.
    """
    while True:
        try:
            connection = socket.create_connection((address, port), timeout=_SILENT_SECONDS)
        except socket.gaierror as error:
            raise ClusterError(
                f"--master-addr {address}: no such host ({error.strerror}); give node 0's address"
            ) from error
        except OSError:
            wait()
            continue
        line = Line(connection, 0, inbox)
        nonce = (line.receive() or {}).get("nonce")
        if nonce is not None:
            said = {**hello, "clock": time.time()}
            line.send({"hello": said, "proof": _proof(key, str(nonce), said)})
            answer = line.receive() or {}
            if reason := answer.get("refused"):
                line.close()
                raise ClusterError(f"node 0 ({address}) refuses this node: {reason}")
            if answer.get("welcome"):
                line.begin()
                return line
        line.close()  # something else listens there, or node 0 is just ending
        wait()


def take(
    inbox: queue.Queue[tuple[int, Message | None]], seconds: float
) -> tuple[int, Message | None] | None:
    """What comes next; None if nothing does within `seconds`."""
    try:
        return inbox.get(timeout=seconds) if seconds else inbox.get_nowait()
    except queue.Empty:
        return None


def _proof(key: bytes, nonce: str, hello: Message) -> str:
    text = json.dumps([nonce, hello], sort_keys=True)
    return hmac.new(key, text.encode(), "sha256").hexdigest()
