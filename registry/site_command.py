"""The command of lora-registry that writes a gallery."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from registry.command_line import open_named, print_json, registry_options

if TYPE_CHECKING:
    from registry.api import Registry
    from registry.manifest import FileEntry, Manifest
    from registry.site_content import Advance, Seen
    from registry.site_output import Output

_MANY = 50
"""From so many on, there is a bar."""


@click.command()
@click.argument("out", metavar="DIR|s3://BUCKET/PREFIX")
@click.option("--title", default="LoRAs", show_default=True, help="What stands above it.")
@click.option(
    "--versions",
    type=click.IntRange(min=1),
    default=10,
    show_default=True,
    metavar="N",
    help="How many versions of each LoRA are shown, beside those that an alias means.",
)
@click.option(
    "--pull-from",
    metavar="PLACE",
    help="Where readers find the registry; default: as it was named.",
)
@registry_options
@click.pass_context
def site(
    ctx: click.Context,
    out: str,
    title: str,
    versions: int,
    pull_from: str | None,
    location: str | None,
    as_json: bool,
) -> None:
    """Write a gallery of the registry: pages that any browser shows, without a server.

    A second run writes what has changed, and removes pages of what is gone. What cannot be shown,
    as its file is missing or damaged, is said, there and on stderr, with exit code 1.

    \b
    Examples:
      lora-registry site public/ --registry ~/loras
      lora-registry site s3://bucket/gallery --pull-from s3://bucket/loras
    """
    registry = open_named(location)
    result, problems = write(registry, out, title, versions, pull_from or registry.location)
    for problem in problems:
        click.echo(f"warning: {problem}", err=True)
    index = f"{result.target.words.rstrip('/')}/index.html"
    if as_json:
        print_json(
            {
                "index": index,
                "written": result.written,
                "removed": result.removed,
                "unchanged": result.unchanged,
                "problems": problems,
            }
        )
    else:
        click.echo(
            f"{len(result.written)} files written, {result.unchanged} unchanged, "
            f"{len(result.removed)} removed",
            err=True,
        )
        click.echo(index)
    ctx.exit(1 if problems else 0)


def write(
    registry: Registry, out: str, title: str, versions: int, pull_from: str
) -> tuple[Output, list[str]]:
    """Bring the gallery in `out` to what the registry holds now; what was done, and what could not
    be shown.

    Raises RegistryError if the registry cannot be read or `out` not be written.
    """
    from registry import site as pages
    from registry.site_content import pictures_of, read
    from registry.site_output import output
    from registry.site_style import ICON, STYLE

    result = output(out)
    with _bar("reading") as begin:
        shown = read(registry, versions, begin)
    wanted = {
        entry.sha256: (manifest, entry)
        for found in shown
        for manifest in reversed(found.manifests)  # of several with a picture the newest counts
        for entry in pictures_of(manifest)
    }
    with _bar("pictures") as begin:
        seen, problems = _pictures(registry, result, wanted, begin)
    gallery = pages.Gallery(title, pull_from, tuple(found.lora(seen, problems) for found in shown))
    texts = {
        "style.css": STYLE,
        "icon.svg": ICON,
        **{pages.page_path(lora.name): pages.lora_page(gallery, lora) for lora in gallery.loras},
        "index.html": pages.index(gallery),  # last, so that its links lead somewhere
    }
    with _bar("pages") as begin:
        result.put_changed({path: text.encode() for path, text in texts.items()}, begin)
    result.finish({*texts, *(pages.picture_path(digest) for digest in seen)}, seen)
    return result, [problem for found in shown for problem in found.problems] + [*problems.values()]


def _pictures(
    registry: Registry,
    result: Output,
    wanted: dict[str, tuple[Manifest, FileEntry]],
    begin: Callable[[int], Advance],
) -> tuple[dict[str, Seen], dict[str, str]]:
    """Copy the pictures that are not there yet; what each says, or why it cannot be shown, by
    digest."""
    from registry.models import in_parallel
    from registry.site import picture_path
    from registry.site_content import blob, look

    known, seen, problems = result.record.pictures, {}, {}
    new = []
    for digest, (_, entry) in wanted.items():
        if digest in known and result.has(picture_path(digest), entry.size, digest):
            seen[digest] = known[digest]
        else:
            new.append(digest)
    result.unchanged += len(seen)
    result.announce([picture_path(digest) for digest in new])
    advance = begin(len(new))

    def copy(digest: str) -> None:
        manifest, entry = wanted[digest]
        data, problem = blob(registry, manifest, entry)
        if not problem:
            try:
                seen[digest] = look(data)
                result.put(picture_path(digest), data)
            except ValueError as error:
                problem = f"{entry.path} of {manifest.reference} {error}; push it with another"
        if problem:
            problems[digest] = problem
        advance(1)

    in_parallel(copy, new)
    return seen, {digest: problems[digest] for digest in new if digest in problems}


@contextmanager
def _bar(label: str) -> Iterator[Callable[[int], Advance]]:
    """A bar on stderr, if there is much to do."""
    import threading

    bars: list[Any] = []
    lock = threading.Lock()

    def begin(count: int) -> Advance:
        if count < _MANY:
            return lambda _: None
        bar = click.progressbar(length=count, label=label, file=sys.stderr, show_pos=True)
        bars.append(bar.__enter__())

        def advance(more: int) -> None:
            with lock:  # they come from several threads
                bar.update(more)

        return advance

    try:
        yield begin
    finally:
        for bar in bars:
            bar.__exit__(None, None, None)
