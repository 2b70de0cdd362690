"""Keeps a run open to be looked at while it goes: the endpoint, and what is sent to a gateway."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from urllib.error import URLError
from urllib.parse import urlsplit

from launcher.endpoint import served
from launcher.errors import LaunchError
from launcher.job import Start
from launcher.metrics import Course, Devices, RunCollector, Watched, text_of
from launcher.progress import Progress
from launcher.request import Scraping
from trainer.plan import Plan

_PUSH_SECONDS = 15.0
_PUSH_TIMEOUT = 5.0


class Observer:
    """The course of the run that this process leads, once an attempt has begun."""

    def __init__(self) -> None:
        self.course: Course | None = None

    def watched(self, shown: Progress, run: str, plan: Plan, start: Start) -> Progress:
        """Progress of an attempt that is noted too; counters go on from the attempt before."""
        before = self.course
        used = start.device_ids if plan.device_target == "Ascend" else ()
        self.course = Course(run, plan, start.attempt, start.rank_ids, Devices(used))
        if before is not None:
            self.course.restarts = before.restarts + 1
            self.course.skipped = before.skipped
            self.course.compile_seconds = before.compile_seconds
        return Watched(shown, self.course)

    def enters(self, phase: str) -> None:
        """What comes after training."""
        if self.course is not None:
            self.course.phase = phase

    def published(self, size: int) -> None:
        """A version of so many bytes was pushed."""
        if self.course is not None:
            self.course.pushes += 1
            self.course.pushed_bytes += size

    def text(self) -> bytes:
        """All series, none before an attempt has begun."""
        return b"" if self.course is None else text_of(self.course)

    def is_ready(self) -> bool:
        """Was a step done?"""
        return self.course is not None and self.course.steps_seen > 0


@contextlib.contextmanager
def observed(scraping: Scraping, tell: Callable[[str], None]) -> Iterator[Observer]:
    """Serve and send as asked, until the block ends.

    `tell` is given sentences for the user. Raises LaunchError if the endpoint is required and
    cannot be had, or the token cannot be read.
    """
    observer = Observer()
    with contextlib.ExitStack() as stack:
        if scraping.port is not None:
            try:
                url = stack.enter_context(
                    served(
                        observer.text,
                        observer.is_ready,
                        scraping.host,
                        scraping.port,
                        _token(scraping),
                        scraping.certificate,
                        scraping.key,
                    )
                )
                tell(f"metrics at {url}")
            except LaunchError as error:
                if scraping.required:
                    raise
                tell(f"warning: {error}; training goes on without")
        if scraping.push_gateway is not None:
            stack.enter_context(_pushed(scraping.push_gateway, observer, tell))
        yield observer


def _token(scraping: Scraping) -> str | None:
    if scraping.token_file is None:
        return None
    try:
        token = scraping.token_file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise LaunchError(
            f"--metrics-token-file {scraping.token_file}: cannot be read; give a text file with "
            "the token"
        ) from error
    if not token:
        raise LaunchError(
            f"--metrics-token-file {scraping.token_file}: it is empty; write a token into it"
        )
    return token


@contextlib.contextmanager
def _pushed(url: str, observer: Observer, tell: Callable[[str], None]) -> Iterator[None]:
    """Send the series now and then, and once more at the end."""
    end = threading.Event()
    where = urlsplit(url).netloc.rpartition("@")[2] or "that address"
    said = False

    def push() -> None:
        nonlocal said
        from prometheus_client import CollectorRegistry, push_to_gateway

        if observer.course is None:
            return
        registry = CollectorRegistry()
        registry.register(RunCollector(observer.course))
        node = {"run": observer.course.run, "instance": socket.gethostname()}
        try:
            push_to_gateway(url, "lora-launch", registry, node, timeout=_PUSH_TIMEOUT)
        except (URLError, OSError, ValueError) as error:
            if not said:
                said = True
                tell(
                    f"warning: the Pushgateway at {where} does not take metrics "
                    f"({getattr(error, 'reason', error)}); training goes on, and it is tried again"
                )

    def often() -> None:
        while not end.wait(_PUSH_SECONDS):
            push()

    thread = threading.Thread(target=often, daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join(_PUSH_TIMEOUT + 1)
        push()
