"""The model card: a page in Markdown with the header that the Hugging Face Hub reads."""

from __future__ import annotations

from collections.abc import Sequence

from registry import facts
from registry.evaluation import measured
from registry.manifest import Manifest


def card(manifest: Manifest) -> str:
    """The page of a version, written from the facts."""
    import yaml

    name = manifest.name
    triggers = facts.words(manifest, "trigger_words")
    front = {
        "tags": ["lora", "stable-diffusion", "text-to-image", *facts.words(manifest, "tags")],
        **({"license": facts.licence(manifest)} if facts.licence(manifest) else {}),
        **({"base_model": facts.base_name(manifest)} if facts.base_name(manifest) else {}),
        **({"instance_prompt": triggers[0]} if triggers else {}),
    }
    parts = [f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---", f"# {name}"]
    if triggers:
        parts.append(f"Write {_or(triggers)} into the prompt.")
    pictures = [file.path for file in manifest.files if file.path.endswith(".png")]
    if pictures:
        parts.append(" ".join(f"![{name}]({path})" for path in pictures))
    parts.append(_table(("", ""), facts.rows(manifest)))
    if scores := facts.scores(manifest):
        parts.append("## Scores")
        parts.append(_table(("metric", "value", "interval", "base without it"), scores))
    for said in measured(manifest):
        parts.append(f"{_plain(said)}.")
    parts.append("## Use")
    parts.append(f"    lora-sample --lora {name} --prompt {_quoted(triggers)}")
    parts.append(
        "or, as a kohya LoRA, with any program that reads one; for diffusers:\n\n"
        f'    pipeline.load_lora_weights("{manifest.files[0].path}")'
    )
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    if not rows:
        return ""
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join(f"| {' | '.join(_plain(cell) for cell in line)} |" for line in lines)


def _plain(text: str) -> str:
    """Text that is neither markup nor a new cell."""
    for character in "\\|<>*_`[]":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())


def _or(words: tuple[str, ...]) -> str:
    return " or ".join(f"**{_plain(word)}**" for word in words)


def _quoted(triggers: tuple[str, ...]) -> str:
    text = f"{triggers[0]}, a lighthouse" if triggers else "a lighthouse"
    return '"' + " ".join(text.split()).replace('"', "'") + '"'
