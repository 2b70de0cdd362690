"""gc against pushes as a state machine, followed through every order in which the requests of
several of each can happen, with a crash between any two; and the worst of these orders for real.

One file is looked at, which all pushes publish. A client's step is one request, as in
registry.garbage, registry.upkeep and registry.api.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import pytest

from registry import garbage
from registry.api import Registry, RegistryError, blob_key, open_registry
from registry.states import remove
from registry.store import FolderStore
from registry.upkeep import collect, verify

CRASHED, DONE = "crashed", "done"


@dataclass(frozen=True)
class Client:
    """Where a push or a gc is, and what it knows."""

    at: str
    due: int | None = None
    """Which mark gc has seen, if it was old enough."""
    slow: bool = False
    """gc has been announced for so long that it counts as dead."""


@dataclass(frozen=True)
class World:
    """The store and all clients: first the pushes, then the gcs."""

    clients: tuple[Client, ...]
    pushes: int
    blob: bool = True
    """An earlier version, which is removed, has left the file."""
    mark: str | None = None
    """None, "young" or "old"."""
    made: int = 0
    """How many marks were made before; in a registry its time tells one mark from another."""
    within: frozenset[int] = frozenset()
    """The pushes that have looked at the marks before the mark was made."""
    manifests: frozenset[int] = frozenset()
    announced: frozenset[int] = frozenset()
    """The gcs whose announcement is there."""

    def move(self, who: int, **changes: object) -> World:
        clients = list(self.clients)
        clients[who] = replace(clients[who], **changes)  # type: ignore[arg-type]
        return replace(self, clients=tuple(clients))

    def looked(self) -> frozenset[int]:
        """The pushes that are between their look at the marks and their manifest."""
        under_way = ("unmark", "wait", "look", "write", "commit")
        return frozenset(k for k in range(self.pushes) if self.clients[k].at in under_way)

    def living(self) -> bool:
        """Is a gc announced that does not count as dead?"""
        return any(
            not self.clients[k].slow and self.clients[k].at != CRASHED for k in self.announced
        )


@dataclass(frozen=True)
class Rules:
    """The parts of the protocol, each of which can be left out."""

    unmark: bool = True
    wait: bool = True
    announce: bool = True
    look_again: bool = True
    same_mark: bool = True
    lease: bool = True
    grace: bool = True


def push(world: World, who: int, rules: Rules) -> Iterator[World]:
    """LIST marks; of a marked file DELETE the mark; LIST announcements until there are none; HEAD
    the file, PUT it if it is not there; PUT the manifest."""
    me, wait = world.clients[who], "wait" if rules.wait else "look"
    if me.at == "marks":
        yield world.move(who, at="unmark" if world.mark and rules.unmark else wait)
    elif me.at == "unmark":
        yield replace(world, mark=None).move(who, at=wait)
    elif me.at == "wait":
        yield world if world.living() else world.move(who, at="look")
    elif me.at == "look":
        yield world.move(who, at="commit" if world.blob else "write")
    elif me.at == "write":
        yield replace(world, blob=True).move(who, at="commit")
    elif me.at == "commit":
        yield replace(world, manifests=world.manifests | {who}).move(who, at=DONE)


def gc(world: World, who: int, rules: Rules) -> Iterator[World]:
    """LIST marks, LIST files, LIST manifests; DELETE the mark of a needed file or PUT one on
    another; if there was an old one: PUT announcement, LIST marks, DELETE the file, the mark, the
    announcement."""
    me = world.clients[who]
    if me.at == "marks":
        yield world.move(who, at="files", due=world.made if world.mark == "old" else None)
    elif me.at == "files":
        yield world.move(who, at="manifests" if world.blob else DONE)
    elif me.at == "manifests":
        if world.manifests:
            yield world.move(who, at="unmark")
        else:
            yield world.move(who, at="mark" if me.due is None else "announce")
    elif me.at == "mark":
        if world.mark is None:
            world = replace(world, mark="young", made=world.made + 1, within=world.looked())
        yield world.move(who, at=DONE)
    elif me.at == "announce":
        if rules.announce:
            world = replace(world, announced=world.announced | {who})
        yield world.move(who, at="again" if rules.look_again else "delete")
    elif me.at == "again":
        same = me.due == world.made or not rules.same_mark
        yield world.move(who, at="delete" if world.mark == "old" and same else "leave")
    elif me.at == "delete":
        if me.slow and rules.lease:
            yield world.move(who, at="leave")
        else:
            yield replace(world, blob=False).move(who, at="unmark")
    elif me.at == "unmark":
        yield replace(world, mark=None).move(who, at="leave")
    elif me.at == "leave":
        yield replace(world, announced=world.announced - {who}).move(who, at=DONE)
    if me.at in ("again", "delete") and not me.slow:
        yield world.move(who, slow=True)


def steps(world: World, rules: Rules) -> Iterator[World]:
    """What can happen next."""
    for who, client in enumerate(world.clients):
        if client.at not in (CRASHED, DONE):
            yield from (push if who < world.pushes else gc)(world, who, rules)
            yield world.move(who, at=CRASHED)
    # A mark grows old: what had looked before it was made has ended by then.
    if world.mark == "young" and not (rules.grace and world.within & world.looked()):
        yield replace(world, mark="old", within=frozenset())


def explore(pushes: int, gcs: int, rules: Rules) -> tuple[int, list[World]]:
    """How many states can be reached, and those in which nobody has anything left to do."""
    start = World((Client("marks"),) * (pushes + gcs), pushes)
    starts = [start, replace(start, mark="old"), replace(start, blob=False)]
    seen, open_, ends = set(starts), list(starts), []
    while open_:
        world = open_.pop()
        assert world.blob or not world.manifests, world
        following = [*steps(world, rules)]
        if all(client.at in (CRASHED, DONE) for client in world.clients):
            ends.append(world)
        for next_ in following:
            if next_ not in seen:
                seen.add(next_)
                open_.append(next_)
    return len(seen), ends


@pytest.mark.parametrize(("pushes", "gcs"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_every_order_of_requests(pushes: int, gcs: int) -> None:
    states, ends = explore(pushes, gcs, Rules())
    assert states > 50
    # All pushes can succeed beside all gcs, and gc can do its work.
    whole = [world for world in ends if all(client.at == DONE for client in world.clients)]
    assert any(len(world.manifests) == pushes for world in whole)
    assert any(not world.blob for world in ends)


@pytest.mark.parametrize("left_out", list(Rules.__dataclass_fields__))
def test_every_part_is_needed(left_out: str) -> None:
    with pytest.raises(AssertionError):
        for pushes, gcs in ((1, 1), (1, 2), (2, 1), (2, 2)):
            explore(pushes, gcs, replace(Rules(), **{left_out: False}))


class Watched(FolderStore):
    """Calls what the test gives it before some requests."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.before: dict[str, Callable[[], object]] = {}

    def _tell(self, words: str) -> None:
        for prefix in [key for key in self.before if words.startswith(key)]:
            self.before.pop(prefix)()

    def delete(self, key: str) -> None:
        self._tell(f"DELETE {key}")
        super().delete(key)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        self._tell(f"PUT {key}")
        return super().put_if_absent(key, data)

    def entries(self, prefix: str) -> Iterator:  # type: ignore[type-arg]
        self._tell(f"LIST {prefix}")
        yield from super().entries(prefix)


@dataclass
class Due:
    """A registry in which gc has a file to remove, and what it was made of."""

    folder: Path
    file: Path
    blob: Path
    gc: Watched = field(init=False)

    def __post_init__(self) -> None:
        self.gc = Watched(self.folder)


@pytest.fixture
def due(folder: Path, loras: Registry, make_lora: Callable[..., Path]) -> Due:
    file = make_lora()
    manifest = loras.push("ink", file)
    loras.push("ink", make_lora("other.safetensors", seed=2))
    remove(loras, "ink@1")
    collect(loras, dry_run=False)
    for mark in (folder / "garbage").iterdir():
        os.utime(mark, (1, 1))
    return Due(folder, file, folder / blob_key(manifest.files[0]))


def test_a_push_waits_for_a_gc_that_may_remove_its_file(due: Due) -> None:
    waits = threading.Event()
    pushing = Watched(due.folder)
    pushing.before["LIST collecting/"] = waits.set
    worker = threading.Thread(target=lambda: Registry(pushing).push("oil", due.file))

    def between_look_and_delete() -> None:
        worker.start()
        assert waits.wait(30)
        assert due.blob.exists()

    due.gc.before[f"DELETE blobs/sha256/{due.blob.parent.name}/{due.blob.name}"] = (
        between_look_and_delete
    )
    collect(Registry(due.gc), dry_run=False)
    worker.join(30)
    after = open_registry(str(due.folder))
    assert after.versions("oil") == [1]
    assert verify(after, None) == []
    assert not list((due.folder / "collecting").iterdir())


@pytest.mark.parametrize("before", ["PUT collecting/", "DELETE collecting/"])
def test_a_push_beside_the_announcement(due: Due, before: str) -> None:
    """Before it gc finds the mark gone; at its end the push finds the file gone."""
    store = FolderStore(due.folder)

    def push() -> None:
        if before.startswith("DELETE"):
            for entry in store.entries("collecting/"):
                os.utime(due.folder / entry.key, (1, 1))  # as if it had been killed there
        Registry(store).push("oil", due.file)

    due.gc.before[before] = push
    found = collect(Registry(due.gc), dry_run=False)
    of_lora = [entry.due for entry in found if entry.key.endswith(due.blob.name)]
    assert of_lora == [before.startswith("DELETE")]
    assert verify(open_registry(str(due.folder)), None) == []


def test_a_gc_that_fails_leaves_its_announcement_to_grow_old(
    due: Due, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RegistryError("the answer is lost")

    due.gc.before["DELETE blobs/"] = fail
    with pytest.raises(RegistryError, match="the answer is lost"):
        collect(Registry(due.gc), dry_run=False)
    (announcement,) = (due.folder / "collecting").iterdir()
    os.utime(announcement, (1, 1))
    collect(Registry(FolderStore(due.folder)), dry_run=False)
    assert not due.blob.exists()
    assert not announcement.exists()


def test_a_push_of_other_files_does_not_wait(
    due: Due, loras: Registry, make_lora: Callable[..., Path]
) -> None:
    other = make_lora("third.safetensors", seed=3)
    due.gc.before["DELETE blobs/"] = lambda: loras.push("oil", other, card="# oil")
    collect(Registry(due.gc), dry_run=False)
    assert loras.versions("oil") == [1]
    assert not due.blob.exists()


def test_a_push_that_took_long_looks_again(
    due: Due, monkeypatch: pytest.MonkeyPatch, loras: Registry, make_lora: Callable[..., Path]
) -> None:
    """Such as one on a machine that slept: meanwhile its file was marked and removed."""
    os.unlink(next((due.folder / "garbage").glob(due.blob.name)))
    store, looks = FolderStore(due.folder), []
    put, spare = store.put_blob, garbage.spare

    def slow(key: str, *rest: object, **more: object) -> None:
        put(key, *rest, **more)  # type: ignore[arg-type]
        if len(looks) == 1 and key.endswith(due.blob.name):
            collect(loras, dry_run=False)
            collect(loras, dry_run=False, grace=timedelta(0))
            assert not due.blob.exists()
            clock[0] += 3600

    clock = [0.0]
    monkeypatch.setattr(store, "put_blob", slow)
    monkeypatch.setattr("registry.api._clock", lambda: clock[0])
    monkeypatch.setattr(garbage, "spare", lambda *a: (looks.append(1), spare(*a)))
    Registry(store).push("oil", due.file)
    assert len(looks) == 2
    assert verify(loras, None) == []
