"""The two protocols by which versions are numbered, as state machines, followed through every order
in which the requests of two and three clients can happen, with a crash between any two of them.

A state is what the store holds, which writes are on their way to it, and where each client is. A
client's step is one request; its answer decides where it is next. A write comes to pass some time
after it was sent, or not at all, whether or not its client still waits for the answer or lives;
that it does so twice changes nothing, for then it is there already. registry.creation and
registry.api take the same steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

CRASHED, DONE = "crashed", "done"
"""Who gives up, with an error, leaves behind what a crash does."""


class Client(NamedTuple):
    """Where a client is, and what it knows."""

    at: str
    number: int = 0
    """The version that it is trying to take."""
    got: int | None = None
    """The version that it was told it has."""
    slow: bool = False
    """It has held its claim for so long that others may remove it."""


class Write(NamedTuple):
    """A manifest on its way to the store."""

    number: int
    client: int
    if_absent: bool


class World(NamedTuple):
    """The store, the network and all clients."""

    versions: tuple[tuple[int, int], ...]
    """Number and client of each manifest that can be read."""
    claims: frozenset[tuple[int, int]]
    """Number and client of each claim."""
    clients: tuple[Client, ...]
    sent: frozenset[Write] = frozenset()
    overwritten: bool = False

    def owner(self, number: int) -> int | None:
        return dict(self.versions).get(number)

    def newest(self) -> int:
        return max((number for number, _ in self.versions), default=0)

    def put(self, number: int, client: int) -> World:
        """A write without a condition."""
        there = self.owner(number)
        return self._replace(
            versions=tuple(sorted({**dict(self.versions), number: client}.items())),
            overwritten=self.overwritten or there not in (None, client),
        )

    def move(self, who: int, **changes: object) -> World:
        clients = list(self.clients)
        clients[who] = clients[who]._replace(**changes)  # type: ignore[arg-type]
        return self._replace(clients=tuple(clients))

    def end(self, who: int, at: str) -> World:
        """What a client knew is of no account any more, but for what it was told."""
        return self.move(who, at=at, number=0, slow=False)

    def send(self, who: int, if_absent: bool) -> World:
        write = Write(self.clients[who].number, who, if_absent)
        return self._replace(sent=self.sent | {write}).move(who, at="sent")


Step = Callable[[World, int], Iterator[World]]


def arrivals(world: World) -> Iterator[World]:
    """What can become of a write on its way: it is lost; or it arrives, and its client, if it still
    waits, hears of that or does not."""
    for write in world.sent:
        after = world._replace(sent=world.sent - {write})
        yield after
        refused = write.if_absent and world.owner(write.number) is not None
        if not refused:
            after = after.put(write.number, write.client)
            yield after
        client = world.clients[write.client]
        if (client.at, client.number) == ("sent", write.number):
            yield after.move(write.client, at="refused" if refused else "written")


def conditional(world: World, who: int) -> Iterator[World]:
    """LIST, PUT if absent, and after a refusal GET, which tells one's own write from a rival's."""
    me = world.clients[who]
    if me.at == "list":
        yield world.move(who, at="put", number=world.newest() + 1)
    elif me.at == "put":
        yield world.send(who, if_absent=True)
    elif me.at == "sent":  # no answer comes: once more
        yield world.move(who, at="put")
    elif me.at == "written":
        yield world.move(who, got=me.number).end(who, DONE)
    elif me.at == "refused":
        if world.owner(me.number) == who:
            yield world.move(who, got=me.number).end(who, DONE)
        else:
            yield world.end(who, "list")


def claiming(
    world: World,
    who: int,
    *,
    if_absent: bool = False,
    second_look: bool = True,
    lists: bool = True,
    lease: bool = True,
    age: bool = True,
    leaves_claim: bool = True,
) -> Iterator[World]:
    """HEAD, LIST claims, PUT claim, LIST claims until alone, HEAD, PUT, DELETE claim. The order of
    clients stands for that of the times in claims; `if_absent` is for a server that minds it.

    A claim is removed by others only when no write under it is on its way any more: that is what
    its age is for. Who does not hear what became of a write leaves the claim there.
    """
    me = world.clients[who]
    mine = (me.number, who)
    if me.at == "list":
        yield world.move(who, at="look", number=world.newest() + 1)
    elif me.at == "look":
        taken = world.owner(me.number) is not None
        yield world.end(who, "list") if taken else world.move(who, at="peek")
    elif me.at == "peek":
        claims = {claim for claim in world.claims if claim[0] == me.number}
        yield world.move(who, at="look" if claims else "claim")
        for claim in claims:  # one whose holder died, or has held it for too long
            holder = world.clients[claim[1]]
            on_its_way = any((write.number, write.client) == claim for write in world.sent)
            if (holder.at == CRASHED or holder.slow) and not (age and on_its_way):
                yield world._replace(claims=world.claims - {claim}).move(who, at="look")
    elif me.at == "claim":
        after = world._replace(claims=world.claims | {mine})
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
            yield world.send(who, if_absent)
    elif me.at == "sent":  # no answer comes: once more while there is time, or it gives up
        if not (me.slow and lease):
            yield world.send(who, if_absent)
        if not leaves_claim:
            yield world.move(who, at="leave")
    elif me.at == "written":
        yield world.move(who, at="release", got=me.number)
    elif me.at == "refused":
        if world.owner(me.number) == who:
            yield world.move(who, at="release", got=me.number)
        else:
            yield world.move(who, at="leave")
    elif me.at in ("leave", "release"):
        after = world._replace(claims=world.claims - {mine})
        yield after.end(who, "list" if me.at == "leave" else DONE)
    if me.at in ("claims", "again", "put", "sent") and not me.slow:
        yield world.move(who, slow=True)


def beside_each_other(world: World, who: int) -> Iterator[World]:
    """One who trusts the server's conditions, and others who also claim."""
    return conditional(world, who) if who == 0 else claiming(world, who, if_absent=True)


def explore(step: Step, clients: int) -> tuple[int, list[World]]:
    """How many states can be reached, and those in which nothing is left to happen."""
    start = World((), frozenset(), (Client("list"),) * clients)
    seen, open_, ends = {start}, [start], []
    while open_:
        world = open_.pop()
        check(world)
        following = list(arrivals(world))
        for who, client in enumerate(world.clients):
            if client.at not in (CRASHED, DONE):
                following += [*step(world, who), world.end(who, CRASHED)]
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
    owners = [who for _, who in world.versions]
    assert len(owners) == len(set(owners)), world
    for who, client in enumerate(world.clients):
        if client.got is not None:
            assert world.owner(client.got) == who, world


@pytest.mark.parametrize("clients", [2, 3])
@pytest.mark.parametrize("step", [conditional, claiming, beside_each_other])
def test_every_order_of_requests(step: Step, clients: int) -> None:
    states, ends = explore(step, clients)
    assert states > 50
    # Some end well: all clients done, each with a version of its own.
    assert any(all(client.at == DONE for client in world.clients) for world in ends)


@pytest.mark.parametrize("left_out", ["second_look", "lists", "lease", "age", "leaves_claim"])
def test_every_part_of_the_claims_is_needed(left_out: str) -> None:
    def weaker(world: World, who: int) -> Iterator[World]:
        return claiming(world, who, **{left_out: False})

    with pytest.raises(AssertionError):
        explore(weaker, 2)


def test_claims_do_not_keep_off_who_does_not_claim() -> None:
    """So the condition is sent with them, unless the server refuses it."""

    def mixed(world: World, who: int) -> Iterator[World]:
        return conditional(world, who) if who == 0 else claiming(world, who)

    with pytest.raises(AssertionError):
        explore(mixed, 2)
