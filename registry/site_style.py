"""What every page of a gallery looks like, and the script that filters its index."""

from __future__ import annotations

import base64
import hashlib

STYLE = """\
:root {
  color-scheme: light dark;
  --paper: #f7f7f5; --card: #ffffff; --well: #eeefec; --line: #dcdfe1;
  --ink: #1b2127; --muted: #56606a; --accent: #1f58a8; --other: #a34a00;
  --bad-paper: #fdeceb; --bad-ink: #8c1d18; --good-paper: #e6f1ea; --good-ink: #1d5c38;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171a; --card: #1c2125; --well: #242a2f; --line: #353c43;
    --ink: #e8eaec; --muted: #a6afb8; --accent: #8fbaf7; --other: #f0a868;
    --bad-paper: #401c1b; --bad-ink: #ffb9b2; --good-paper: #18352a; --good-ink: #9fdcb8;
  }
}
*, *::before, *::after { box-sizing: border-box; }
html { scroll-padding-top: 4rem; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 1rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans",
    sans-serif;
  overflow-wrap: anywhere;
}
.skip { position: absolute; left: -100rem; }
.skip:focus { left: 1rem; top: 1rem; padding: .5rem 1rem; background: var(--card); z-index: 1; }
a { color: var(--accent); text-underline-offset: .15em; text-decoration-thickness: 1px; }
a:hover { text-decoration-thickness: 2px; }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; border-radius: .2rem; }
header, main, footer { max-width: 74rem; margin: 0 auto; padding: 0 1.5rem; }
header { padding-top: 3rem; }
main { padding-top: 1.5rem; padding-bottom: 3rem; }
footer { padding-top: 1.5rem; padding-bottom: 3rem; color: var(--muted); font-size: .875rem; }
nav { font-size: .9375rem; margin-bottom: 1.5rem; }
nav ul {
  list-style: none; display: flex; flex-wrap: wrap; gap: .25rem 1.5rem; margin: 0; padding: 0;
}
h1 { font-size: clamp(1.9rem, 4vw, 2.5rem); line-height: 1.2; letter-spacing: -.015em; margin: 0; }
h2 { font-size: 1.35rem; line-height: 1.3; margin: 0 0 1rem; }
h3 { font-size: 1.05rem; line-height: 1.4; margin: 1.75rem 0 .5rem; }
section { margin-top: 3.5rem; }
section:first-child { margin-top: 0; }
p { margin: .5rem 0; max-width: 46rem; }
.lead { font-size: 1.1rem; margin-top: .75rem; }
.muted, small, figcaption { color: var(--muted); }
small, figcaption { font-size: .875rem; }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
code { font-size: .9em; }
mark { background: var(--well); color: inherit; padding: .1em .4em; border-radius: .3em; }
.badge {
  display: inline-block; padding: .05rem .6rem; border-radius: 1rem; font-size: .8125rem;
  line-height: 1.6; font-weight: 500; background: var(--well); color: var(--ink);
  vertical-align: .1em;
}
.badge a { color: inherit; }
.badge.alias { background: var(--good-paper); color: var(--good-ink); }
.badge.yanked { background: var(--bad-paper); color: var(--bad-ink); }
.warning {
  background: var(--bad-paper); color: var(--bad-ink); padding: .75rem 1rem; border-radius: .5rem;
  max-width: none;
}

/* the index */
form { display: grid; grid-template-columns: 2fr 1fr 1fr 1fr; gap: 1rem; margin-bottom: 1rem; }
form[hidden] { display: none; }
label { display: block; font-size: .875rem; color: var(--muted); }
input, select {
  display: block; width: 100%; margin-top: .25rem; padding: .55rem .7rem; min-height: 2.75rem;
  font: inherit; color: var(--ink); background: var(--card);
  border: 1px solid var(--muted); border-radius: .5rem;
}
.cards {
  list-style: none; margin: 1.5rem 0 0; padding: 0; display: grid; gap: 1.5rem;
  grid-template-columns: repeat(auto-fill, minmax(min(19rem, 100%), 1fr));
}
.cards > li {
  display: flex; flex-direction: column; background: var(--card); border: 1px solid var(--line);
  border-radius: .75rem; overflow: hidden; position: relative;
  content-visibility: auto; contain-intrinsic-size: auto 32rem;
}
.cards > li[hidden] { display: none; }
.cards > li:hover { border-color: var(--muted); }
.cards > li:focus-within { outline: 3px solid var(--accent); outline-offset: 2px; }
.cards h2 { font-size: 1.15rem; margin: 0; }
.cards h2 a { color: inherit; text-decoration: none; outline: none; }
.cards h2 a::after { content: ""; position: absolute; inset: 0; }
.cards h2 a:hover { text-decoration: underline; }
.cards .text { padding: 1.1rem 1.25rem 1.25rem; display: flex; flex-direction: column; flex: 1; }
.cards .text > * { margin: 0 0 .6rem; }
.cards .text > .last { margin: auto 0 0; font-size: .875rem; }
.preview {
  flex: none; height: 11.5rem; overflow: hidden; background: var(--well);
  display: flex; align-items: center; justify-content: center;
  color: var(--muted); font-size: .875rem;
}
.preview img { width: 100%; height: 100%; object-fit: contain; display: block; }
.preview img.wide { object-fit: cover; object-position: left; }
.cards dd small { display: inline-block; white-space: nowrap; }
.cards dl {
  display: grid; grid-template-columns: fit-content(8.5rem) 1fr; gap: .15rem .9rem;
  font-size: .9375rem;
}
dt { color: var(--muted); }
dd { margin: 0; }
.tags { display: flex; flex-wrap: wrap; gap: .35rem; list-style: none; padding: 0; }

/* the page of a LoRA */
.top {
  display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 2.5rem; align-items:
  start;
}
.top.alone { grid-template-columns: minmax(0, 46rem); }
figure { margin: 0; }
figure img {
  max-width: 100%; height: auto; display: block; border-radius: .5rem; background: var(--well);
}
figure.small img { width: 100%; }
figcaption { margin-top: .5rem; }
figcaption ol { margin: 0; padding-left: 1.4rem; }
.pictures {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(15rem, 100%), 1fr)); gap:
  1.5rem;
}
dl.facts {
  display: grid; grid-template-columns: minmax(7rem, auto) minmax(0, 1fr); gap: .55rem 1.5rem;
  margin: 0;
}
pre {
  margin: .25rem 0 1.25rem; padding: .9rem 1.1rem; background: var(--well); border-radius: .5rem;
  font-size: .875rem; line-height: 1.6; white-space: pre-wrap; max-width: 58rem;
}
pre code { font-size: inherit; }
pre.command code { user-select: all; }
.wide-table { overflow-x: auto; }
table {
  border-collapse: collapse; width: 100%; font-size: .9375rem; margin: 0 0 1.5rem; overflow-wrap:
  normal;
}
caption { text-align: left; padding: 0 0 .5rem; font-weight: 600; }
caption small { font-weight: 400; }
th, td {
  text-align: left; vertical-align: top; padding: .55rem 1.25rem .55rem 0; border-bottom: 1px
  solid var(--line);
}
th { font-weight: 500; }
thead th {
  color: var(--muted); font-size: .8125rem; padding-bottom: .35rem; vertical-align: bottom;
}
tbody th[scope=rowgroup] {
  padding-top: 1.5rem; color: var(--muted); font-weight: 400; font-size: .875rem;
}
td.number, th.number { white-space: nowrap; font-variant-numeric: tabular-nums; }
td.digest { font-size: .8125rem; overflow-wrap: anywhere; min-width: 16rem; }
td.drawn, th.drawn { width: 15rem; padding-right: 0; }
td.drawn { color: var(--muted); font-size: .8125rem; }
td.number small { display: block; }
.warning + .top { margin-top: 1.5rem; }
.legend { margin: 0 0 1.25rem; max-width: none; }
.scale {
  display: flex; justify-content: space-between; width: 15rem; font-variant-numeric: tabular-nums;
}
svg { display: block; width: 15rem; height: 1.5rem; overflow: visible; }
.lora line { stroke: var(--accent); stroke-width: 2.5; stroke-linecap: round; }
.lora circle { fill: var(--accent); }
.base line { stroke: var(--other); stroke-width: 1.5; stroke-linecap: round; }
.base circle { fill: var(--card); stroke: var(--other); stroke-width: 1.75; }
.legend { font-size: .875rem; color: var(--muted); }
.legend svg {
  display: inline-block; width: 2.5rem; height: 1rem; vertical-align: -.15rem; margin-right:
  .35rem;
}
.legend span { margin-right: 1.5rem; white-space: nowrap; }
details { border-top: 1px solid var(--line); }
details:last-of-type { border-bottom: 1px solid var(--line); }
summary { padding: .9rem 0; cursor: pointer; }
summary strong { font-size: 1.05rem; margin-right: .5rem; }
summary .muted { margin-left: .5rem; font-size: .9375rem; }
details > div { padding: 0 0 2rem; }
details > div > h3:first-child { margin-top: .5rem; }

@media (max-width: 52rem) {
  header { padding-top: 1.75rem; }
  header, main, footer { padding-left: 1.1rem; padding-right: 1.1rem; }
  form { grid-template-columns: 1fr 1fr; }
  form label:first-child { grid-column: 1 / -1; }
  .top { grid-template-columns: minmax(0, 1fr); gap: 2rem; }
  section { margin-top: 2.75rem; }
}
@media (max-width: 30rem) {
  form { grid-template-columns: 1fr; }
  dl.facts { grid-template-columns: 1fr; gap: 0; }
  dl.facts dd { margin-bottom: .75rem; }
}
@media print {
  form, nav, .skip { display: none; }
  .cards > li { break-inside: avoid; content-visibility: visible; }
}
"""
"""Colours keep 4.5 to 1 on what they stand on, in both schemes."""

SCRIPT = """
const form = document.getElementById("filter");
const cards = [...document.querySelectorAll(".cards > li")];
const count = document.getElementById("count");
function apply() {
  const words = form.elements.words.value.toLowerCase().split(/\\s+/).filter(Boolean);
  let shown = 0;
  for (const card of cards) {
    const fits = words.every(word => card.dataset.text.includes(word))
      && ["base", "tag", "licence"].every(key => !form.elements[key].value
        || card.dataset[key].split("\\n").includes(form.elements[key].value));
    card.hidden = !fits;
    shown += fits;
  }
  const all = cards.length;
  count.textContent = shown === all ? `${all} LoRAs` : `${shown} of ${all} LoRAs`;
}
form.hidden = false;
form.addEventListener("input", apply);
form.addEventListener("submit", event => event.preventDefault());
apply();
"""

ICON = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16">
<rect width="16" height="16" rx="3" fill="#1f58a8"/>
<path d="M4 12V4m4 8V6m4 6V8" stroke="#fff" stroke-width="2" stroke-linecap="round"/>
</svg>
"""


def policy(script: str = "") -> str:
    """The Content-Security-Policy of a page: files of its own, and of scripts this one or none."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = f"'sha256-{digest}'" if script else "'none'"
    return (
        f"default-src 'none'; img-src 'self'; style-src 'self'; script-src {allowed}; "
        "base-uri 'none'; form-action 'none'"
    )
