"""What a manifest says about a LoRA, in the words in which one asks whether it can be used.

Publishers write what they like into the metadata; the trainer writes mappings, people write text,
and other tools write into the file's header. All of it is read here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from registry.manifest import Manifest
from registry.words import human_time


def words(manifest: Manifest, key: str) -> tuple[str, ...]:
    """`trigger_words` or `tags`: a list, or text with commas."""
    value = manifest.metadata.get(key)
    if value is None and key == "trigger_words":
        value = manifest.header.get("modelspec.trigger_phrase")
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else []
    return tuple(part.strip() for part in parts if isinstance(part, str) and part.strip())


def licence(manifest: Manifest) -> str:
    """Under which it may be used, as far as somebody said it."""
    return _text(manifest.metadata.get("licence")) or manifest.header.get("modelspec.license", "")


def base_name(manifest: Manifest) -> str:
    """The base model, as its publisher calls it."""
    base = manifest.metadata.get("base")
    if isinstance(base, Mapping):
        named = base.get("path") or base.get("weights") or base.get("model")
        return _text(named)
    return _text(base) or manifest.header.get("ss_sd_model_name", "")


def base_digest(manifest: Manifest) -> str:
    """SHA-256 of the base, in hex."""
    base = manifest.metadata.get("base")
    found = _text(base.get("digest")) if isinstance(base, Mapping) else ""
    header = manifest.header
    return found or header.get("ss_new_sd_model_hash") or header.get("ss_sd_model_hash", "")


def data_digest(manifest: Manifest) -> str:
    """SHA-256 of images and captions, in hex."""
    data = manifest.metadata.get("data")
    found = _text(data.get("digest")) if isinstance(data, Mapping) else _text(data)
    return found or manifest.header.get("lora.data_digest", "")


def rows(manifest: Manifest) -> list[tuple[str, str]]:
    """What is known, each with what it is; what is not known is left out."""
    facts, header = manifest.metadata, manifest.header
    rank, alpha = header.get("ss_network_dim", ""), header.get("ss_network_alpha", "")
    lora = f"rank {rank}" + (f", alpha {alpha}" if alpha else "") if rank else ""
    found = [
        ("trigger words", ", ".join(words(manifest, "trigger_words"))),
        ("licence", licence(manifest)),
        ("base", _joined(base_name(manifest), _generation(manifest))),
        ("base's sha256", base_digest(manifest)),
        ("LoRA", _joined(lora, header.get("modelspec.resolution", ""))),
        ("data", _joined(_images(facts.get("data")), _digest(data_digest(manifest)))),
        ("training", _training(facts)),
        ("seed", _text(facts.get("seed")) or header.get("ss_seed", "")),
        ("parent", _parent(facts.get("parent"))),
        ("code", _code(facts)),
        ("tags", ", ".join(words(manifest, "tags"))),
    ]
    return [(title, text) for title, text in found if text]


def scores(manifest: Manifest) -> list[tuple[str, str, str, str]]:
    """Metric, value, interval and what the base without the LoRA had."""
    found = []
    for key, value in manifest.metrics.items():
        if key.endswith("_base") and key.removesuffix("_base") in manifest.metrics:
            continue
        interval = manifest.intervals.get(key)
        between = f"{interval[0]:.4g} to {interval[1]:.4g}" if interval else ""
        base = manifest.metrics.get(f"{key}_base")
        found.append((key, f"{value:.4g}", between, "" if base is None else f"{base:.4g}"))
    return found


def _generation(manifest: Manifest) -> str:
    version = manifest.header.get("ss_base_model_version", "")
    names = {"sd_v1": "Stable Diffusion 1.x", "sd_v2": "Stable Diffusion 2.x"}
    known = names.get(version.removesuffix("_v"), version)
    return known + (", predicts v" if version in ("sd_v1_v", "sd_v2_v") else "")


def _images(data: Any) -> str:
    examples = data.get("examples") if isinstance(data, Mapping) else None
    return f"{examples:,} images" if isinstance(examples, int) else ""


def _training(facts: Mapping[str, Any]) -> str:
    seconds, devices = facts.get("seconds"), facts.get("devices")
    parts = []
    if isinstance(images := facts.get("images"), int):
        parts.append(f"{images:,} samples")
    if isinstance(steps := facts.get("steps"), int):
        parts.append(f"{steps:,} steps")
    if isinstance(seconds, Mapping) and isinstance(total := seconds.get("total"), (int, float)):
        parts.append(human_time(total))
    if isinstance(devices, Mapping):
        parts.append(f"{devices.get('count')} × {devices.get('product') or devices.get('target')}")
    return ", ".join(parts)


def _parent(parent: Any) -> str:
    if not isinstance(parent, Mapping):
        return _text(parent)
    return _joined(_text(parent.get("reference")), _digest(_text(parent.get("sha256"))))


def _code(facts: Mapping[str, Any]) -> str:
    code, versions = facts.get("code"), facts.get("versions")
    parts = []
    if isinstance(code, Mapping) and (commit := _text(code.get("commit"))):
        clean = code.get("clean")
        parts.append(commit[:12] + ("" if clean else ", with changes not committed"))
    if isinstance(versions, Mapping):
        parts += [f"{package} {version}" for package, version in list(versions.items())[:4]]
    return ", ".join(parts)


def _digest(text: str) -> str:
    return f"sha256 {text[:16]}…" if text else ""


def _joined(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def _text(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
