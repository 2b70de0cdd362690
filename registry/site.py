"""The pages of a gallery: what a registry holds, in; HTML text, out.

Nothing is read or written here. All that comes from publishers goes through `text`; pages refer to
nothing but files of the same gallery, by relative addresses, and can be read without JavaScript.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from registry import facts, signing
from registry.evaluation import measured
from registry.manifest import Manifest
from registry.models import Model
from registry.references import NAME_PATTERN
from registry.site_scores import Scored, main_scores, tables
from registry.site_style import SCRIPT, policy
from registry.site_text import span, text, time
from registry.states import Event
from registry.words import human_size

_SOURCE = ("base's sha256", "data", "training", "seed", "parent", "code")
"""Of the facts: where a version comes from. The others say whether it can be used."""
_SMALL = 300
"""Pixels: narrower pictures are shown larger than they are."""


@dataclass(frozen=True)
class Picture:
    """A picture of a version."""

    path: str
    """Its name in the version."""
    sha256: str
    width: int = 0
    height: int = 0
    captions: tuple[str, ...] = ()
    """The prompts that it says it was drawn from."""
    problem: str = ""
    """Why it cannot be shown."""


@dataclass(frozen=True)
class Version:
    """A version that is shown."""

    manifest: Manifest
    aliases: tuple[str, ...] = ()
    yanked: str | None = None
    pictures: tuple[Picture, ...] = ()

    @property
    def number(self) -> int:
        return self.manifest.version


@dataclass(frozen=True)
class Lora:
    """A model of the registry."""

    model: Model
    versions: tuple[Version, ...]
    """Those that are shown, newest first."""
    card: str = ""
    """Of the version that stands for the model."""
    card_is_written: bool = False
    """By a person, not from the facts."""
    events: tuple[Event, ...] = ()
    """Newest first."""

    @property
    def name(self) -> str:
        return self.model.name

    @property
    def head(self) -> Version:
        """The version that stands for the model: the newest that is not yanked."""
        return next((v for v in self.versions if v.yanked is None), self.versions[0])


@dataclass(frozen=True)
class Gallery:
    """All of it."""

    title: str
    pull_from: str
    """What readers put after --registry."""
    loras: tuple[Lora, ...] = ()


def picture_path(sha256: str) -> str:
    """Where a picture is in a gallery."""
    return f"pictures/{sha256}.png"


def page_path(name: str) -> str:
    """Where the page of a LoRA is in a gallery."""
    return f"loras/{name}.html"


def index(gallery: Gallery) -> str:
    """The page with a card for each LoRA, those with the newest versions first."""
    loras = sorted(gallery.loras, key=lambda lora: lora.name)
    loras.sort(key=lambda lora: lora.head.manifest.created, reverse=True)
    count = len(loras)
    if not loras:
        body = f"<p>Nothing has been pushed to {text(gallery.pull_from)} yet.</p>\n"
        return _page(gallery.title, _header("", gallery.title, "") + _main(body), "")
    lead = (
        f'<p class="lead muted">{count} {"LoRAs" if count > 1 else "LoRA"} for Stable Diffusion, '
        "each with its scores, its licence and how to get it.</p>\n"
    )
    heads = [lora.head.manifest for lora in loras]
    selects = "".join(
        (
            _select("base", "Base", {facts.base_name(head) for head in heads}),
            _select("tag", "Tag", {tag for head in heads for tag in facts.words(head, "tags")}),
            _select("licence", "Licence", {facts.licence(head) for head in heads}),
        )
    )
    body = (
        '<form id="filter" role="search" hidden>\n'
        '<label>Search <input name="words" type="search" autocomplete="off" '
        'placeholder="name, trigger word, tag…"></label>\n'
        f"{selects}</form>\n"
        '<p id="count" class="muted" role="status"></p>\n'
        f'<ul class="cards">\n{"".join(_card(lora) for lora in loras)}</ul>\n'
    )
    script = f"<script>{SCRIPT}</script>\n"
    return _page(gallery.title, _header("", gallery.title, lead) + _main(body), "", script)


def lora_page(gallery: Gallery, lora: Lora) -> str:
    """The page of one LoRA."""
    head = lora.head
    manifest = head.manifest
    yanked = ' <span class="badge yanked">yanked</span>' if head.yanked is not None else ""
    lead = f'<p class="lead"><span class="badge">newest @{head.number}</span>{yanked} '
    lead += f"{_aliases(lora, '#v')}</p>\n"
    triggers = facts.words(manifest, "trigger_words")
    if triggers:
        words = " or ".join(f"<mark>{text(word)}</mark>" for word in triggers)
        lead += f'<p class="lead">Write {words} into the prompt.</p>\n'
    links = [("use", "Use"), ("scores", "Scores"), ("versions", "Versions")]
    links += [("card", "Card")] if lora.card else []
    links += [("log", "Log")] if lora.events else []
    nav = (
        '<nav aria-label="Page">\n<ul>\n<li><a href="../index.html">← All LoRAs</a></li>\n'
        + "".join(f'<li><a href="#{anchor}">{word}</a></li>\n' for anchor, word in links)
        + "</ul>\n</nav>\n"
    )
    known = {other.name: {version.number for version in other.versions} for other in gallery.loras}
    compared = tables([Scored(v.manifest, v.yanked is not None) for v in lora.versions])
    sections = [
        _top(lora),
        _section("use", "Use it", _use(gallery, head)),
        _section("scores", "Scores", compared or _none("Nothing was measured.")),
        _section("versions", "Versions", _versions(lora, known)),
        _section("card", "Card", _card_text(lora)) if lora.card else "",
        _section("log", "Who did what", _log(lora.events)) if lora.events else "",
    ]
    content = _header(nav, lora.name, lead) + _main("".join(sections))
    return _page(f"{lora.name} – {gallery.title}", content, "../")


def _header(nav: str, title: str, lead: str) -> str:
    return f"<header>\n{nav}<h1>{text(title)}</h1>\n{lead}</header>\n"


def _main(body: str) -> str:
    return f'<main id="main">\n{body}</main>\n'


def _page(title: str, content: str, up: str, script: str = "") -> str:
    allowed = policy(SCRIPT if script else "")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{allowed}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>{text(title)}</title>\n"
        f'<link rel="stylesheet" href="{up}style.css">\n'
        f'<link rel="icon" type="image/svg+xml" href="{up}icon.svg">\n'
        '</head>\n<body>\n<a class="skip" href="#main">Skip to the content</a>\n'
        f"{content}<footer>Written by <code>lora-registry site</code>.</footer>\n"
        f"{script}</body>\n</html>\n"
    )


# ---- the index


def _select(key: str, title: str, values: Iterable[str]) -> str:
    words = sorted({" ".join(value.split()) for value in values} - {""}, key=str.lower)
    options = "".join(f'<option value="{text(word)}">{text(word)}</option>' for word in words)
    return (
        f'<label>{title} <select name="{key}"><option value="">any</option>{options}</select>'
        "</label>\n"
    )


def _card(lora: Lora) -> str:
    head = lora.head
    manifest = head.manifest
    triggers, tags = facts.words(manifest, "trigger_words"), facts.words(manifest, "tags")
    base, licence = facts.base_name(manifest), facts.licence(manifest)
    aliases = sorted(lora.model.aliases)
    searched = " ".join((lora.name, *triggers, *tags, base, *aliases)).lower()
    rows = [
        ("Trigger", ", ".join(f"<mark>{text(word)}</mark>" for word in triggers)),
        ("Base", text(base)),
        ("Licence", text(licence) or span("muted", "not stated")),
        *((text(title), said) for title, said in main_scores(manifest)),
    ]
    listed = "".join(f"<dt>{title}</dt><dd>{said}</dd>\n" for title, said in rows if said)
    means = _aliases(lora)
    tag_list = "".join(f'<li class="badge">{text(tag)}</li>' for tag in tags)
    versions = len(lora.model.versions)
    return (
        f'<li data-text="{text(" ".join(searched.split()))}" data-base="{_datum([base])}" '
        f'data-tag="{_datum(tags)}" data-licence="{_datum([licence])}">\n'
        f'<div class="preview">{_preview(lora.head)}</div>\n<div class="text">\n'
        f'<h2><a href="{page_path(lora.name)}">{text(lora.name)}</a> '
        f'<span class="badge">@{head.number}</span></h2>\n'
        + (f"<p>{means}</p>\n" if means else "")
        + (f'<p class="warning">Do not use: {text(head.yanked)}</p>\n' if head.yanked else "")
        + f"<dl>\n{listed}</dl>\n"
        + (f'<ul class="tags" aria-label="Tags">{tag_list}</ul>\n' if tag_list else "")
        + f'<p class="last muted">{time(manifest.created)} · '
        f"{versions} {'versions' if versions > 1 else 'version'}</p>\n</div>\n</li>\n"
    )


def _aliases(lora: Lora, link: str = "") -> str:
    """What each means, with a link to that version if `link` says where they are."""
    found = []
    for alias, entry in sorted(lora.model.aliases.items()):
        words = f"{text(alias)} = @{entry.version}"
        if link:
            words = f'<a href="{link}{entry.version}">{words}</a>'
        found.append(f'<span class="badge alias">{words}</span>')
    return " ".join(found)


def _datum(values: Sequence[str]) -> str:
    return text("\n".join(" ".join(value.split()) for value in values))


def _first(version: Version) -> Picture | None:
    """The picture that stands for a version."""
    return next((picture for picture in version.pictures if not picture.problem), None)


def _preview(head: Version) -> str:
    picture = _first(head)
    if picture is None:
        return "no picture"
    wide = ' class="wide"' if picture.width >= 2 * picture.height else ""
    return _image(head.manifest, picture, "", wide)


def _image(manifest: Manifest, picture: Picture, up: str, more: str = "") -> str:
    said = "; ".join(picture.captions) or f"drawn with {manifest.reference}"
    return (
        f'<img src="{up}{picture_path(picture.sha256)}" width="{picture.width}" '
        f'height="{picture.height}" alt="{text(said)}" loading="lazy"{more}>'
    )


# ---- the page of a LoRA


def _section(anchor: str, title: str, body: str) -> str:
    return (
        f'<section id="{anchor}" aria-labelledby="{anchor}-title">\n'
        f'<h2 id="{anchor}-title">{title}</h2>\n{body}</section>\n'
    )


def _none(words: str) -> str:
    return f'<p class="muted">{words}</p>\n'


def _badges(version: Version) -> str:
    found = [f' <span class="badge alias">{text(alias)}</span>' for alias in version.aliases]
    if version.yanked is not None:
        found.append(' <span class="badge yanked">yanked</span>')
    return "".join(found)


def _top(lora: Lora) -> str:
    head = lora.head
    manifest = head.manifest
    rows = dict(facts.rows(manifest))
    usable = {
        "Licence": text(rows.get("licence", ""))
        or span("muted", "not stated; ask who published it before you use it"),
        "Base": text(rows.get("base", "")) or span("muted", "not stated"),
        "LoRA": text(
            ", ".join(x for x in (rows.get("LoRA"), human_size(manifest.files[0].size)) if x)
        ),
        "Tags": text(rows.get("tags", "")),
        "Published": time(manifest.created) + _by(manifest),
        "Newest": text(f"{manifest.reference}, of {len(lora.model.versions)} versions")
        if len(lora.model.versions) > 1
        else text(f"{manifest.reference}, the only version"),
    }
    warning = f'<p class="warning">{_do_not_use(head)}</p>\n' if head.yanked is not None else ""
    said = f"<div>\n<h2>Can I use this?</h2>\n{_list(usable)}</div>\n"
    first = _first(head)
    alone, figure = ("", _figure(manifest, first)) if first else (" alone", "")
    return f'{warning}<div class="top{alone}">\n{figure}{said}</div>\n'


def _do_not_use(version: Version) -> str:
    reference, reason = version.manifest.reference, version.yanked or ""
    return f"<strong>Do not use {text(reference)}.</strong> {text(reason)}"


def _by(manifest: Manifest) -> str:
    return f" by {text(manifest.pushed_by)}" if manifest.pushed_by else ""


def _list(rows: Mapping[str, str]) -> str:
    listed = "".join(f"<dt>{title}</dt><dd>{said}</dd>\n" for title, said in rows.items() if said)
    return f'<dl class="facts">\n{listed}</dl>\n'


def _figure(manifest: Manifest, picture: Picture) -> str:
    if picture.problem:
        return f'<p class="warning">{text(picture.problem)}</p>\n'
    small = ' class="small"' if picture.width < _SMALL else ""
    image = f'<a href="../{picture_path(picture.sha256)}">{_image(manifest, picture, "../")}</a>'
    prompts = [f"<li>{text(caption)}</li>" for caption in picture.captions]
    order = "from left to right" if picture.width > 3 * picture.height else "row by row"
    caption = f"Prompts, {order}:<ol>{''.join(prompts)}</ol>" if prompts else ""
    if len(prompts) == 1:
        caption = f"Prompt: {text(picture.captions[0])}"
    caption = caption or f"Drawn with {text(manifest.reference)}"
    return f"<figure{small}>\n{image}\n<figcaption>{caption}</figcaption>\n</figure>\n"


def _use(gallery: Gallery, head: Version) -> str:
    manifest = head.manifest
    file = manifest.files[0].path
    triggers = facts.words(manifest, "trigger_words")
    prompt = " ".join(", ".join((*triggers[:1], "a lighthouse")).split())
    force = " --force" if head.yanked is not None else ""
    commands = (
        (
            "Get the file, compared with its digest:",
            f"lora-registry pull {manifest.reference} --out loras/ "
            f"--registry {_quoted(gallery.pull_from)}{force}",
        ),
        (
            "Draw with it:",
            f"lora-sample --lora {manifest.reference} --prompt {_quoted(prompt)} "
            f"--registry {_quoted(gallery.pull_from)}",
        ),
        ("In diffusers:", f'pipeline.load_lora_weights("loras/{file}")'),
    )
    return "".join(
        f'<p>{words}</p>\n<pre class="command"><code>{text(command)}</code></pre>\n'
        for words, command in commands
    ) + (
        '<p class="muted">Other programs read the file too, where they read LoRAs of kohya; '
        "<code>lora-registry export</code> writes other forms.</p>\n"
        if file.endswith(".safetensors")
        else ""
    )


def _quoted(word: str) -> str:
    """For a shell, whatever is in it."""
    return shlex.quote(word)


def _versions(lora: Lora, known: Mapping[str, set[int]]) -> str:
    shown = "".join(_version(lora, version, known) for version in lora.versions)
    older = len(lora.model.versions) - len(lora.versions)
    if older:
        shown += _none(
            f"{older} more {'versions are' if older > 1 else 'version is'} not shown: "
            f"<code>lora-registry list {text(lora.name)} --versions</code>"
        )
    return shown


def _version(lora: Lora, version: Version, known: Mapping[str, set[int]]) -> str:
    manifest = version.manifest
    opened = " open" if version is lora.head else ""
    parts = []
    if version.yanked is not None:
        parts.append(f'<p class="warning">{_do_not_use(version)}</p>\n')
    others = [p for p in version.pictures if version is not lora.head or p is not _first(version)]
    if others:
        figures = "".join(_figure(manifest, picture) for picture in others)
        parts.append(f'<h3>Pictures</h3>\n<div class="pictures">\n{figures}</div>\n')
    parts.append(f"<h3>Where it comes from</h3>\n{_list(_source(version, known))}")
    if lines := measured(manifest):
        parts.append(
            f"<h3>How it was measured</h3>\n{''.join(f'<p>{text(x)}</p>' for x in lines)}\n"
        )
    parts.append(_files(manifest))
    return (
        f"<details{opened}>\n<summary>"
        f"<strong>{text(manifest.reference)}</strong>{_badges(version)}"
        f'<span class="muted">{time(manifest.created)}{_by(manifest)}</span></summary>\n'
        # Inside, so that a link to it opens the fold.
        f'<div id="v{version.number}">\n{"".join(parts)}</div>\n</details>\n'
    )


def _source(version: Version, known: Mapping[str, set[int]]) -> dict[str, str]:
    manifest = version.manifest
    rows = {title: said for title, said in facts.rows(manifest) if title in _SOURCE}
    found = {
        "Base": text(facts.base_name(manifest)),
        "Base’s sha256": _code(rows.get("base's sha256", "")),
        "Data": text(rows.get("data", "").partition("sha256")[0].rstrip(", ")),
        "Data’s sha256": _code(facts.data_digest(manifest)),
        "Training": text(rows.get("training", "")),
        "Seed": text(rows.get("seed", "")),
        "Parent": _linked(rows.get("parent", ""), known),
        "Code": text(rows.get("code", "")),
        "Signed by": _code(signing.signer(manifest.signature) or ""),
    }
    return found if any(found.values()) else {"Origin": span("muted", "not stated")}


def _code(words: str) -> str:
    return f"<code>{text(words)}</code>" if words else ""


def _linked(parent: str, known: Mapping[str, set[int]]) -> str:
    """A parent, with a link to its page if it is in this gallery."""
    match = re.match(rf"({NAME_PATTERN[1:-1]})@([1-9][0-9]{{0,7}})(?![0-9])", parent)
    if match is None or match[1] not in known:
        return text(parent)
    anchor = f"#v{match[2]}" if int(match[2]) in known[match[1]] else ""
    link = f'<a href="{match[1]}.html{anchor}">{text(match[0])}</a>'
    return link + text(parent[match.end() :])


def _files(manifest: Manifest) -> str:
    rows = "".join(
        f'<tr><th scope="row">{text(file.path)}</th><td class="number">{human_size(file.size)}</td>'
        f'<td class="digest"><code>{file.sha256}</code></td></tr>\n'
        for file in manifest.files
    )
    return (
        '<h3>Files</h3>\n<div class="wide-table" role="group" aria-label="Files" tabindex="0">'
        "<table>\n<caption><small>What "
        f"{text(manifest.reference)} consists of</small></caption>\n"
        '<thead><tr><th scope="col">File</th><th scope="col">Size</th>'
        f'<th scope="col">SHA-256</th></tr></thead>\n<tbody>\n{rows}</tbody>\n</table></div>\n'
    )


def _card_text(lora: Lora) -> str:
    plain = re.sub(r"\A---\n.*?\n---\n", "", lora.card, flags=re.DOTALL).strip("\n")
    shown = f"<pre>{text(plain)}</pre>\n"
    if lora.card_is_written:
        return shown
    return (
        "<details>\n<summary>Written from the facts above</summary>\n"
        f"<div>{shown}</div>\n</details>\n"
    )


def _log(events: Sequence[Event]) -> str:
    rows = "".join(
        f"<tr><td>{_moment(event.at)}</td><td>{text(event.by)}</td><td>{text(event.text)}</td>"
        f"<td>{text(event.reason)}</td></tr>\n"
        for event in events
    )
    return (
        '<div class="wide-table" role="group" aria-label="Log" tabindex="0"><table>\n'
        "<caption><small>Newest first; times are UTC"
        '</small></caption>\n<thead><tr><th scope="col">When</th><th scope="col">Who</th>'
        '<th scope="col">What</th><th scope="col">Why</th></tr></thead>\n'
        f"<tbody>\n{rows}</tbody>\n</table></div>\n"
    )


def _moment(at: datetime) -> str:
    return time(at, "%Y-%m-%d %H:%M")
