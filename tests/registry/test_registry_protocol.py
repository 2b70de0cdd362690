"""The two protocols by which versions are numbered, as state machines, followed through every order
in which the requests of two and three clients can happen, with a crash between any two of them.

A state is what the store holds and where each client is. A client's step is one request; its
answer decides where it is next. registry.creation and registry.api take the same steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest

CRASHED, DONE = "crashed", "done"


@dataclass(frozen=True)
class Client:
    """Where a client is, and what it knows."""

    at: str
    number: int = 0
    """The version that it is trying to take."""
    got: int | None = None
    """The version that it was told it has."""
    slow: bool = False
    """It has held its claim for so long that others may remove it."""


@dataclass(frozen=True)
class World:
    """The store and all clients."""

    versions: tuple[tuple[int, int], ...]
    """Number and client of each manifest that can be read."""
    claims: frozenset[tuple[int, int]]
    """Number and client of each claim."""
    clients: tuple[Client, ...]
    overwritten: bool = False

    def owner(self, number: int) -> int | None:
        return dict(self.versions).get(number)

    def newest(self) -> int:
        return max((number for number, _ in self.versions), default=0)

    def put(self, number: int, client: int) -> World:
        """A write without a condition."""
        there = self.owner(number)
        return replace(
            self,
            versions=tuple(sorted({**dict(self.versions), number: client}.items())),
            overwritten=self.overwritten or there not in (None, client),
        )

    def move(self, who: int, **changes: object) -> World:
        clients = list(self.clients)
        clients[who] = replace(clients[who], **changes)  # type: ignore[arg-type]
        return replace(self, clients=tuple(clients))


Step = Callable[[World, int], Iterator[World]]


def conditional(world: World, who: int) -> Iterator[World]:
    """LIST, PUT if absent, and after a refusal GET, which tells one's own write from a rival's."""
    me = world.clients[who]
    if me.at == "list":
        yield world.move(who, at="put", number=world.newest() + 1)
    elif me.at == "put":
        if world.owner(me.number) is None:
            written = world.put(me.number, who)
            yield written.move(who, at=DONE, got=me.number)
            yield written.move(who, at="put")  # the answer is lost: the client writes once more
        else:
            yield world.move(who, at="get")
    elif me.at == "get":
        if world.owner(me.number) == who:
            yield world.move(who, at=DONE, got=me.number)
        else:
            yield world.move(who, at="list")


def claiming(
    world: World, who: int, *, second_look: bool = True, lists: bool = True, lease: bool = True
) -> Iterator[World]:
    """HEAD, LIST claims, PUT claim, LIST claims until alone, HEAD, PUT, DELETE claim, where
    conditions do nothing. The order of clients stands for that of the times in claims."""
    me = world.clients[who]
    mine = (me.number, who)
    if me.at == "list":
        yield world.move(who, at="look", number=world.newest() + 1)
    elif me.at == "look":
        taken = world.owner(me.number) is not None
        yield world.move(who, at="list" if taken else "peek")
    elif me.at == "peek":
        claims = {claim for claim in world.claims if claim[0] == me.number}
        yield world.move(who, at="look" if claims else "claim")
        for claim in claims:  # one whose holder died, or has held it for too long
            holder = world.clients[claim[1]]
            if holder.at == CRASHED or holder.slow:
                yield replace(world, claims=world.claims - {claim}).move(who, at="look")
    elif me.at == "claim":
        after = replace(world, claims=world.claims | {mine})
        yield after.move(who, at="claims" if lists else "again", slow=False)
    elif me.at == "claims":
        claims = {claim for claim in world.claims if claim[0] == me.number}
        if claims == {mine}:
            yield world.move(who, at="again" if second_look else "put")
        else:
            yield world.move(who, at="leave")
            if claims and mine == min(claims):
                yield world  # it waits for the others to leave
    elif me.at == "again":
        yield world.move(who, at="leave" if world.owner(me.number) is not None else "put")
    elif me.at == "put":
        if me.slow and lease:
            yield world.move(who, at="leave")
        else:
            yield world.put(me.number, who).move(who, at="release", got=me.number)
    elif me.at in ("leave", "release"):
        after = replace(world, claims=world.claims - {mine})
        yield after.move(who, at="list" if me.at == "leave" else DONE)
    if me.at in ("claims", "again", "put") and not me.slow:
        yield world.move(who, slow=True)


def explore(step: Step, clients: int) -> tuple[int, list[World]]:
    """How many states can be reached, and those in which nobody has anything left to do."""
    start = World((), frozenset(), (Client("list"),) * clients)
    seen, open_, ends = {start}, [start], []
    while open_:
        world = open_.pop()
        check(world)
        following = []
        for who, client in enumerate(world.clients):
            if client.at not in (CRASHED, DONE):
                following += [*step(world, who), world.move(who, at=CRASHED)]
        if not following:
            ends.append(world)
        for next_ in following:
            if next_ not in seen:
                seen.add(next_)
                open_.append(next_)
    return len(seen), ends


def check(world: World) -> None:
    """Nothing is lost, doubled or left out."""
    assert not world.overwritten, world
    numbers = [number for number, _ in world.versions]
    assert numbers == list(range(1, len(numbers) + 1)), world
    for who, client in enumerate(world.clients):
        if client.got is not None:
            assert world.owner(client.got) == who, world


@pytest.mark.parametrize("clients", [2, 3])
@pytest.mark.parametrize("step", [conditional, claiming])
def test_every_order_of_requests(step: Step, clients: int) -> None:
    states, ends = explore(step, clients)
    assert states > 50
    # Some end well: all clients done, each with a version of its own.
    assert any(all(client.at == DONE for client in world.clients) for world in ends)
    for world in ends:
        owners = [who for _, who in world.versions]
        assert len(owners) == len(set(owners))


@pytest.mark.parametrize("left_out", ["second_look", "lists", "lease"])
def test_every_part_of_the_claims_is_needed(left_out: str) -> None:
    def weaker(world: World, who: int) -> Iterator[World]:
        return claiming(world, who, **{left_out: False})

    with pytest.raises(AssertionError):
        explore(weaker, 2)
