"""A proxy between a client and an S3 server that does to requests and answers what networks do."""

from __future__ import annotations

import http.client
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

DROP, CUT, DELAY, REPEAT = "drop", "cut", "delay", "repeat"
BUSY, SPOIL_REQUEST, SPOIL_ANSWER, TRUNCATE = "busy", "spoil request", "spoil answer", "truncate"
SKEW, LATE = "skew", "late"
ALL = dict.fromkeys((DROP, CUT, DELAY, REPEAT, BUSY, SPOIL_REQUEST, SPOIL_ANSWER, TRUNCATE), 1)
"""Every fault that can come and go, by how often it comes."""

_BUSY = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>slow down</Message></Error>"
_SKEWED = (
    b"<?xml version='1.0'?><Error><Code>RequestTimeTooSkewed</Code><Message>The difference between "
    b"the request time and the current time is too large.</Message></Error>"
)
_TIMEOUT = b"<html><body>504 Gateway Time-out</body></html>"
_NOT_IMPLEMENTED = (
    b"<?xml version='1.0'?><Error><Code>NotImplemented</Code><Message>A header you provided "
    b"implies functionality that is not implemented.</Message></Error>"
)
_EXISTS = (
    b"<?xml version='1.0'?><Error><Code>ObjectAlreadyExists</Code><Message>The object exists and "
    b"may not be overwritten.</Message></Error>"
)


class FaultProxy:
    """Its address, what it does, and how often it did."""

    def __init__(self, upstream: str, faults: Mapping[str, int], share: float, seed: int):
        self.upstream = urlsplit(upstream).netloc
        self.faults = dict(faults)
        self.share = share
        """Of requests that something is done to."""
        self.done: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()
        """By method."""
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self.endpoint_url = ""
        self.chosen: list[tuple[str, str, str, int]] = []
        """Faults of chosen requests: method, part of the URL, fault, how often it still comes."""
        self.late: list[tuple[str, str, dict[str, str], bytes]] = []
        """Requests that were answered with 504 and can still be followed: see `land`."""
        self.own_condition: str | None = None
        """A header that forbids to overwrite, in place of If-None-Match, which is then refused."""

    def draw(self, method: str, path: str) -> tuple[str | None, float]:
        """A fault or none, and a random number for it."""
        with self._lock:
            self.requests[method] += 1
            for place, (wanted, part, fault, times) in enumerate(self.chosen):
                if method == wanted and part in path and times:
                    self.chosen[place] = (wanted, part, fault, times - 1)
                    self.done[fault] += 1
                    return fault, 0.0
            if not self.faults or self._random.random() >= self.share:
                return None, 0.0
            found = self._random.choices([*self.faults], [*self.faults.values()])[0]
            listing = "list-type" in path or "uploads" in path
            if found == SPOIL_ANSWER and (method != "GET" or listing):
                return None, 0.0  # a listing has no digest, by which it could be seen
            self.done[found] += 1
            return found, self._random.random()

    def land(self) -> None:
        """Let the requests come to pass that a gateway still had in hand."""
        for method, path, headers, body in self.late:
            connection = http.client.HTTPConnection(self.upstream, timeout=120)
            connection.request(method, path, body or None, headers)
            assert connection.getresponse().status == 200
            connection.close()
        self.late = []


@contextmanager
def fault_proxy(
    upstream: str, faults: Mapping[str, int] = ALL, share: float = 0.05, seed: int = 0
) -> Iterator[FaultProxy]:
    """Stand before the server at `upstream`, on a free port of the loopback interface."""
    proxy = FaultProxy(upstream, faults, share, seed)

    class Handler(_Handler):
        pass

    Handler.proxy = proxy

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, *_: Any) -> None:
            """A client that went away is no news here."""

    server = Server(("127.0.0.1", 0), Handler)
    proxy.endpoint_url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultProxy
    _upstream: http.client.HTTPConnection | None = None

    def _serve(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        fault, chance = self.proxy.draw(self.command, self.path)
        if fault == DROP:
            self.close_connection = True
            return
        if fault == DELAY:
            time.sleep(chance)
        if fault == BUSY:
            self._answer(503, [("Content-Type", "application/xml")], _BUSY)
            return
        if fault == SKEW:
            self._answer(403, [("Content-Type", "application/xml")], _SKEWED)
            return
        if fault == LATE:
            self.proxy.late = [(self.command, self.path, dict(self.headers.items()), body)]
            self._answer(504, [("Content-Type", "text/html")], _TIMEOUT)
            return
        if fault == SPOIL_REQUEST and body:
            body = _spoilt(body, chance)
        if self.proxy.own_condition and self.headers.get("If-None-Match"):
            self._answer(501, [("Content-Type", "application/xml")], _NOT_IMPLEMENTED)
            return
        status, headers, content = self._forward(body)
        if status == 412 and self.proxy.own_condition:
            self._answer(409, [("Content-Type", "application/xml")], _EXISTS)
            return
        if fault == REPEAT:
            status, headers, content = self._forward(body)
        if fault == CUT:
            self.close_connection = True
            return
        if fault == SPOIL_ANSWER and status in (200, 206) and content:
            content = _spoilt(content, chance)
        self._answer(status, headers, content, len(content) // 2 if fault == TRUNCATE else None)

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        for fresh in (False, True):
            if self._upstream is None or fresh:
                self._upstream = http.client.HTTPConnection(self.proxy.upstream, timeout=120)
            headers = {k: v for k, v in self.headers.items() if k.lower() != "expect"}
            own = self.proxy.own_condition
            if own and headers.get(own) == "true":
                headers["If-None-Match"] = "*"
            try:
                self._upstream.request(self.command, self.path, body or None, headers)
                answer = self._upstream.getresponse()
                content = answer.read()
            except (http.client.HTTPException, OSError):
                self._upstream.close()
                if fresh:
                    raise
                continue
            return answer.status, answer.getheaders(), content
        raise AssertionError

    def _answer(
        self, status: int, headers: list[tuple[str, str]], content: bytes, end: int | None = None
    ) -> None:
        self.send_response_only(status)
        left_out = {"transfer-encoding", "connection", "keep-alive", "content-length"}
        length = len(content)
        for key, value in headers:
            if key.lower() == "content-length" and self.command == "HEAD":
                length = int(value)
            if key.lower() not in left_out:
                self.send_header(key, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:end])
        self.wfile.flush()
        if end is not None:
            self.close_connection = True

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


def _spoilt(data: bytes, chance: float) -> bytes:
    changed = bytearray(data)
    changed[int(chance * len(data))] ^= 1
    return bytes(changed)
