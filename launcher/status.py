"""How a run stands, read from its folder alone; folders of older versions may lack anything.

Nothing here waits for the run or disturbs it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import re
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.errors import LaunchError
from registry.words import human_size, human_time

Event = Mapping[str, Any]

STOPPED = 75
"""Exit code of an attempt that was asked to end and has saved."""
_SAME_BOOT_SECONDS = 2.0
"""By which two ways to tell the age of a sign of life may differ on the machine it comes from."""
_SILENT_SECONDS = 600.0
"""A run on another machine that is silent for longer is taken for ended."""
_LAUNCHER = re.compile(r"lora-launch|launcher[./](cli|run)\b")
"""In the command line of one."""
_SMOOTHED = 20
"""Steps over which the loss is averaged."""


@dataclass(frozen=True)
class Attempt:
    """What one start of a run has left behind; an empty dict stands for a file that is missing."""

    path: Path
    events: list[dict[str, Any]]
    unreadable: int
    """Lines of events.jsonl that are no events."""
    plan: dict[str, Any]
    result: dict[str, Any]
    stopped: dict[str, Any]
    published: dict[str, Any]
    push: dict[str, Any]
    """What was to be published, written down before."""
    scores: dict[str, Any]

    @property
    def number(self) -> int:
        """1 for the first."""
        return int(self.path.name.removeprefix("attempt_"))

    @property
    def failure(self) -> dict[str, Any]:
        """What ended it, if the launcher could still say so."""
        return next((event for event in reversed(self.events) if event["event"] == "failure"), {})

    @property
    def start_step(self) -> int:
        """The steps that were done before it."""
        if isinstance(step := self.plan.get("start_step"), int):
            return step
        steps = (number(event, "step") for event in self.events if event["event"] == "step")
        return int(next(filter(math.isfinite, steps), 1.0)) - 1

    @property
    def to_do(self) -> str | None:
        """What is left to do with what it has trained."""
        there = {path.name for path in self.path.iterdir()} if self.path.is_dir() else set()
        if "evaluate.json" in there and "evaluated.json" not in there:
            return "evaluated"
        return "published" if "push.json" in there and "published.json" not in there else None


@dataclass(frozen=True)
class Course:
    """The events of all attempts as those of one run: what was done twice is there once."""

    steps: list[dict[str, Any]]
    validations: list[dict[str, Any]]
    checkpoints: list[dict[str, Any]]
    remarks: list[tuple[int, dict[str, Any]]]
    """Warnings, slow ranks and failures, each with the number of its attempt."""


@dataclass(frozen=True)
class State:
    """Where a run stands."""

    name: str
    """running, waiting, finished, failed or interrupted."""
    detail: str
    at_work: bool
    """Somebody is at work on it."""


@dataclass(frozen=True)
class Rank:
    """The last that was heard of a rank."""

    rank_id: int
    phase: str
    age_seconds: float | None
    """None where it cannot be told: on another machine, or after a new start of this one."""


@dataclass(frozen=True)
class Status:
    """A run on one screen."""

    name: str
    folder: str
    state: str
    detail: str
    attempt: int
    phase: str
    step: int
    steps: int | None
    loss: float | None
    smoothed_loss: float | None
    validation: dict[str, Any] | None
    """The last loss and its step, the best and its step, and the first, which is the base's."""
    images_per_second: float | None
    seconds_left: float | None
    checkpoint: dict[str, Any] | None
    ranks: tuple[Rank, ...]
    warnings: tuple[str, ...]
    published: str | None

    def as_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


# ---- reading the folder


def read_attempts(folder: Path) -> list[Attempt]:
    """All attempts of a run, the first one first. Raises LaunchError if it is no run's folder."""
    attempt_folders = paths_of_attempts(folder)
    return [_read_attempt(path) for path in attempt_folders]


def paths_of_attempts(folder: Path) -> list[Path]:
    """The folders of a run's attempts. Raises LaunchError if there are none."""
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise LaunchError(
            f"{folder}: expected the folder of a run, found {found}; correct the path"
        )
    named = folder.absolute().name
    if named.startswith("attempt_") and named[8:].isdigit():
        raise LaunchError(
            f"{folder}: expected the folder of a run, found one of its attempts; name the folder "
            "above it"
        )
    found_paths = [path for path in folder.glob("attempt_*") if path.name[8:].isdigit()]
    if not found_paths:
        raise LaunchError(
            f"{folder}: expected the folder of a run, found no attempt in it; name one of the "
            "folders that lora-launch makes"
        )
    return sorted(found_paths, key=lambda path: int(path.name[8:]))


def _read_attempt(path: Path) -> Attempt:
    events, unreadable = read_events(path / "events.jsonl")
    return Attempt(
        path=path,
        events=events,
        unreadable=unreadable,
        plan=read_json(path / "plan.json"),
        result=read_json(path / "result.json"),
        stopped=read_json(path / "stopped.json"),
        published=read_json(path / "published.json"),
        push=read_json(path / "push.json"),
        scores=read_json(path / "evaluated.json"),
    )


def read_events(path: Path) -> tuple[list[dict[str, Any]], int]:
    """All events that can be read, and how many lines cannot; the last may be half written."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return [], 0
    except OSError as error:
        raise LaunchError(f"{path}: cannot be read: {error.strerror}") from error
    events, unreadable = [], 0
    for position, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            event = json.loads(line)
        except ValueError:
            event = None
        if isinstance(event, dict) and isinstance(event.get("event"), str):
            events.append(event)
        elif position < len(lines) - 1:
            unreadable += 1
    return events, unreadable


def read_json(path: Path) -> dict[str, Any]:
    """An object in a file; an empty one if there is none, or it is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def number(values: Mapping[str, Any] | None, key: str) -> float:
    """A figure of an event; NaN if it is missing or no number."""
    value = (values or {}).get(key)
    return float(value) if isinstance(value, (int, float)) else math.nan


def text_of(values: Mapping[str, Any], key: str, otherwise: str = "") -> str:
    """A word of an event or plan."""
    value = values.get(key)
    return value if isinstance(value, str) else otherwise


# ---- what it comes to


def course_of(attempts: Sequence[Attempt]) -> Course:
    """One run out of its attempts, each of which goes on where a checkpoint of the one before
    was: the steps after it were done anew."""
    kept: dict[str, dict[int, dict[str, Any]]] = {"step": {}, "validation": {}, "checkpoint": {}}
    remarks = []
    for attempt in attempts:
        if any(event["event"] == "step" for event in attempt.events):
            for found in kept.values():
                for step in [step for step in found if step > attempt.start_step]:
                    del found[step]
        for event in attempt.events:
            kind, step_number = event["event"], number(event, "step")
            if kind in kept and math.isfinite(step_number):
                kept[kind][int(step_number)] = event
            elif kind in ("warning", "straggler", "failure"):
                remarks.append((attempt.number, event))
    ordered = {kind: [found[step] for step in sorted(found)] for kind, found in kept.items()}
    return Course(ordered["step"], ordered["validation"], ordered["checkpoint"], remarks)


def state_of(folder: Path, attempts: Sequence[Attempt], now: float) -> State:
    """Where a run stands, at a time in Unix seconds."""
    last = attempts[-1]
    at_work = is_at_work(folder, last.path, now)
    go_on = f"go on with: lora-launch --resume {folder}"
    if last.result:
        digests = last.result.get("rank_digests")
        if isinstance(digests, list) and len(set(map(str, digests))) > 1:
            detail = "the ranks ended with different weights, so nothing was published"
            return State("failed", detail, at_work)
        if last.to_do and at_work:
            return State("running", f"trained, is being {last.to_do}", True)
        if last.to_do:
            return State("waiting", f"trained, and still to be {last.to_do}; {go_on}", False)
        reference = text_of(last.published, "reference")
        artifact = text_of(last.result, "artifact", "lora.safetensors")
        detail = f"published as {reference}" if reference else f"written to {last.path / artifact}"
        return State("finished", detail, at_work)
    failure = last.failure
    reason = text_of(failure, "text", "it failed")
    if at_work and failure:
        return State("waiting", f"starts again after: {reason}", True)
    if at_work:
        return State("running", phase_of(last), True)
    if last.stopped:
        done, of = last.stopped.get("step", "?"), last.stopped.get("steps", "?")
        return State("interrupted", f"saved after step {done} of {of}; {go_on}", False)
    if failure and failure.get("exit_code") != STOPPED:
        return State("failed", reason, False)
    if failure:
        return State("interrupted", reason, False)
    detail = "ended without a word, by a signal or with the machine"
    return State("interrupted", f"{detail}; {go_on}", False)


def phase_of(attempt: Attempt) -> str:
    """What rank 0 is at."""
    phases = (event for event in reversed(attempt.events) if event["event"] == "phase")
    return text_of(next(phases, {}), "phase", "starting")


def is_at_work(folder: Path, attempt: Path, now: float) -> bool:
    """Is a launcher at work on the run?

    On another machine that shares no locks it can only be guessed from the last sign of life.
    """
    lock = folder / "node_0.lock"
    try:
        with lock.open("rb") as file:
            # Shared and for a moment, so that a launcher that starts just now hardly meets it.
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            except OSError:  # a file system without locks
                pass
            words = file.read().decode(errors="replace").split()
        written = lock.stat().st_mtime
    except OSError:
        return False
    if len(words) != 4 or words[3] != socket.gethostname():
        heard = [_mtime(attempt / "events.jsonl"), *map(_mtime, attempt.glob("beats/*"))]
        return len(words) == 4 and now - max(heard) < _SILENT_SECONDS
    return words[1].isdigit() and _is_launcher(int(words[1]), written)


def _is_launcher(pid: int, before: float) -> bool:
    """Is this the process that wrote the lock? It scores and publishes after it has let go."""
    import psutil

    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        started_before = process.create_time() <= before + _SAME_BOOT_SECONDS
        return started_before and bool(_LAUNCHER.search(" ".join(process.cmdline())))
    return False


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def ranks_of(attempt: Attempt, now: float, monotonic: float) -> tuple[Rank, ...]:
    """What each rank was last heard of.

    A beat holds the time of its machine's own clock since it was switched on. Only where that
    agrees with when the file was written is it this machine's, and an age can be told.
    """
    count = attempt.plan.get("devices")
    ids = set(range(count)) if isinstance(count, int) else set()
    paths = {
        int(path.name[5:]): path
        for path in attempt.path.glob("beats/rank_*")
        if path.name[5:].isdigit()
    }
    found = []
    for rank_id in sorted(ids | paths.keys()):
        if rank_id not in paths:
            found.append(Rank(rank_id, "not started", None))
            continue
        written = _mtime(paths[rank_id])
        beat = read_json(paths[rank_id])
        age = monotonic - number(beat, "time")
        agrees = abs(age - (now - written)) < _SAME_BOOT_SECONDS
        found.append(Rank(rank_id, text_of(beat, "phase", "starting"), age if agrees else None))
    return tuple(found)


def smoothed(values: Sequence[float], span: int = _SMOOTHED) -> list[float]:
    """The running mean that weighs the newest value by 2 / (span + 1), without a bias at its
    start; what is not finite is left out."""
    keep = 1 - 2 / (span + 1)
    total, weight, found = 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        found.append(total / weight if weight else math.nan)
    return found


def read_status(folder: Path) -> Status:
    """The status of a run. Raises LaunchError if the folder is none of a run."""
    attempts = read_attempts(folder)
    return status_of(folder, attempts, time.time(), time.monotonic())


def status_of(folder: Path, attempts: Sequence[Attempt], now: float, monotonic: float) -> Status:
    """The status out of what was read, at a time in Unix seconds and since the machine's start."""
    last, course = attempts[-1], course_of(attempts)
    state = state_of(folder, attempts, now)
    step = course.steps[-1] if course.steps else {}
    steps = _integer(step.get("steps")) or _integer(last.plan.get("steps"))
    done = _integer(step.get("step")) or last.start_step
    speed = _finite(number(step, "images_per_second"))
    left = None
    batch = _integer(last.plan.get("global_batch"))
    if state.name == "running" and not last.result and steps and speed and batch:
        left = max(0, steps - done) * batch / speed
    losses = [number(event, "loss") for event in course.steps[-10 * _SMOOTHED :]]
    return Status(
        name=text_of(last.plan, "name", folder.absolute().name),
        folder=str(folder),
        state=state.name,
        detail=state.detail,
        attempt=last.number,
        phase=_doing(last) if state.at_work else phase_of(last),
        step=done,
        steps=steps,
        loss=_finite(losses[-1]) if losses else None,
        smoothed_loss=_finite(smoothed(losses)[-1]) if losses else None,
        validation=_validation(course.validations),
        images_per_second=speed,
        seconds_left=left,
        checkpoint=_checkpoint(course.checkpoints),
        ranks=ranks_of(last, now, monotonic),
        warnings=tuple(
            text_of(event, "text", "?")
            for attempt, event in course.remarks
            if not (event["event"] == "failure" and attempt == last.number)
        ),
        published=text_of(last.published, "reference") or None,
    )


def _doing(attempt: Attempt) -> str:
    """The phase, with how much of the cache is filled while it is being filled."""
    last = attempt.events[-1] if attempt.events else {}
    if last.get("event") == "cache":
        return f"{phase_of(attempt)}, {last.get('done')} of {last.get('total')}"
    return phase_of(attempt)


def _validation(events: Sequence[Event]) -> dict[str, Any] | None:
    finite = [event for event in events if math.isfinite(number(event, "loss"))]
    if not finite:
        return None
    best, last = min(finite, key=lambda event: number(event, "loss")), finite[-1]
    first = finite[0]["loss"] if finite[0]["step"] == 0 else None
    return {
        "step": last["step"],
        "loss": last["loss"],
        "best_step": best["step"],
        "best": best["loss"],
        "base": first,
    }


def _checkpoint(events: Sequence[Event]) -> dict[str, Any] | None:
    if not events:
        return None
    size, when = number(events[-1], "bytes"), number(events[-1], "time")
    return {"step": events[-1]["step"], "bytes": _finite(size), "time": _finite(when)}


def _integer(value: object) -> int | None:
    return value if isinstance(value, int) else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# ---- in words


def status_text(status: Status, now: float) -> str:
    """One screen."""
    of = f" of {status.steps:,}" if status.steps else ""
    rows = {"run folder": status.folder, "attempt": str(status.attempt)}
    if status.state == "running":
        rows["phase"] = status.phase
    rows["step"] = f"{status.step:,}{of}"
    if status.loss is not None:
        mean = (
            "" if status.smoothed_loss is None else f", about {status.smoothed_loss:.4f} on average"
        )
        rows["loss"] = f"{status.loss:.4f}{mean}"
    elif status.step and status.smoothed_loss is None:
        rows["loss"] = "not known, or not a number"
    elif status.step:
        rows["loss"] = f"not a number; {status.smoothed_loss:.4f} on average before"
    if found := status.validation:
        rows["validation"] = f"{found['loss']:.4f} at step {found['step']:,}"
        if found["best_step"] != found["step"]:
            rows["validation"] += f", best {found['best']:.4f} at step {found['best_step']:,}"
        if found["base"] is not None and found["step"] > 0:
            rows["validation"] += f", {found['base']:.4f} before training"
    if status.images_per_second is not None:
        rows["speed"] = f"{status.images_per_second:.3g} images/s"
    if status.seconds_left is not None:
        rows["time left"] = human_time(status.seconds_left)
    rows["checkpoint"] = _checkpoint_text(status.checkpoint, now)
    if status.state in ("running", "waiting"):
        rows |= {f"rank {rank.rank_id}": _rank_text(rank) for rank in status.ranks}
    if not status.warnings:
        rows["warnings"] = "none"
    width = max(map(len, rows))
    lines = [f"{status.name}: {status.state}, {status.detail}"]
    lines += [f"  {key:<{width}}  {value}" for key, value in rows.items()]
    most = 5
    if len(status.warnings) > most:
        lines.append(f"  {len(status.warnings)} warnings, the last {most}:")
    lines += [f"  warning: {text}" for text in status.warnings[-most:]]
    return "\n".join(lines)


def _checkpoint_text(found: Mapping[str, Any] | None, now: float) -> str:
    if found is None:
        return "none yet"
    text = f"step {found['step']:,}"
    if found["time"] is not None:
        text += f", {_ago(now - found['time'])}"
    return text + (f", {human_size(int(found['bytes']))}" if found["bytes"] else "")


def _ago(seconds: float) -> str:
    days = int(seconds // 86_400)
    return f"{days} days ago" if days > 1 else f"{human_time(max(0.0, seconds))} ago"


def _rank_text(rank: Rank) -> str:
    if rank.phase in ("ended", "not started"):
        return rank.phase
    if rank.age_seconds is None:
        return f"{rank.phase}; when it was last heard of can only be told on its machine"
    return f"{rank.phase}, heard of {rank.age_seconds:.1f} s ago"
