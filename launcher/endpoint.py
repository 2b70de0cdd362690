"""The endpoint that a run is scraped at: /metrics, /healthz and /readyz."""

from __future__ import annotations

import contextlib
import hmac
import ssl
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from launcher.errors import LaunchError
from launcher.metrics import CONTENT_TYPE

_TIMEOUT_SECONDS = 10.0
"""For a client that asks and does not read."""
_MOST_AT_ONCE = 16
LOOPBACK = "127.0.0.1"


class _Handler(BaseHTTPRequestHandler):
    text: Callable[[], bytes]
    ready: Callable[[], bool]
    token: str | None
    slots: threading.BoundedSemaphore
    timeout = _TIMEOUT_SECONDS
    server_version, sys_version = "lora-launch", ""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/healthz":
            self._answer(200, b"ok\n")
        elif path == "/readyz":
            ready = self.ready()
            self._answer(200 if ready else 503, b"ready\n" if ready else b"no step was done yet\n")
        elif path != "/metrics":
            self._answer(404, b"see /metrics\n")
        elif not self._allowed():
            self._answer(401, b"a bearer token is needed\n")
        elif not self.slots.acquire(blocking=False):
            self._answer(503, b"too many scrapes at once\n")
        else:
            try:
                self._answer(200, self.text(), CONTENT_TYPE)
            finally:
                self.slots.release()

    do_HEAD = do_GET

    def _allowed(self) -> bool:
        if self.token is None:
            return True
        given = self.headers.get("Authorization", "")
        return hmac.compare_digest(given.encode(), f"Bearer {self.token}".encode())

    def _answer(self, code: int, body: bytes, kind: str = "text/plain; charset=utf-8") -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """A client that went away, or spoke no HTTP, is no news."""


@contextlib.contextmanager
def served(
    text: Callable[[], bytes],
    ready: Callable[[], bool],
    host: str = LOOPBACK,
    port: int = 0,
    token: str | None = None,
    certificate: Path | None = None,
    key: Path | None = None,
) -> Iterator[str]:
    """Serve what `text` makes, until the block ends; yields the URL of /metrics.

    Port 0 takes a free one. With `certificate` and `key` it speaks TLS; with `token` it wants it as
    bearer token. Raises LaunchError if it cannot listen, or the certificate cannot be used.
    """
    slots = threading.BoundedSemaphore(_MOST_AT_ONCE)
    handler = type(
        "Handler",
        (_Handler,),
        {
            "text": staticmethod(text),
            "ready": staticmethod(ready),
            "token": token,
            "slots": slots,
        },
    )
    try:
        server = _Server((host, port), handler)
    except (OSError, OverflowError) as error:
        raise LaunchError(
            f"--metrics-port {port}: cannot listen on {host} ({error}); choose another port, or 0 "
            "for a free one"
        ) from error
    scheme = "http"
    if certificate is not None:
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate, key)
        except (OSError, ssl.SSLError) as error:
            server.server_close()
            raise LaunchError(
                f"--metrics-certificate {certificate}: cannot be used ({error}); give a PEM file "
                "and its --metrics-key"
            ) from error
        # The handshake is made when a connection is read, so that nobody can hold up the others.
        server.socket = context.wrap_socket(
            server.socket, server_side=True, do_handshake_on_connect=False
        )
        scheme = "https"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1})
    thread.daemon = True
    thread.start()
    try:
        yield f"{scheme}://{host}:{server.server_port}/metrics"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
