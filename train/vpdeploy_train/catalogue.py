"""The names of backbones, read from timm's sources: importing timm takes seconds, a misspelt name should not."""

from __future__ import annotations

import difflib
import functools
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

EMBEDDED: Final = "vit_mini_patch8_64"
"""The backbone that ships with this package."""

FAMILIES: Final = ("VisionTransformer", "Eva", "SwinTransformer")
"""timm's classes that prompts enter."""

REFUSED: Final[Mapping[str, str]] = {
    "VisionTransformerDistilled": "its feature is the mean of a class and a distillation token; use a deit_* without "
    "'distilled', or deit3_*",
    "SwinTransformerV2": "its attention compares angles and normalises after it, for which no prefix is written; "
    "use a swin_* of the first version",
    "Beit": "its position bias lies between all rows, for which no prefix is written; use beit3_* or eva02_*",
}
"""What to use instead of timm's classes that are near to these, by class."""

_ARCHITECTURE = re.compile(r"^@register_model\s*\ndef (\w+)\(", re.MULTILINE)
_RENAMED = re.compile(r"^register_model_deprecations\(__name__, \{(.*?)^\}\)", re.MULTILINE | re.DOTALL)
_KEY = re.compile(r"['\"](\w+)['\"]\s*:")
_TAGGED = re.compile(r"['\"](\w+)\.([^'\"\s]+)['\"]\s*:")
_BUILT_CLASS = re.compile(r"build_model_with_cfg\(\s*(\w+)")


@dataclass(frozen=True, kw_only=True)
class Catalogue:
    """timm's architectures.

    Attributes:
        architectures: The class of each architecture; None where its source leaves that open.
        tags: The pretrained weights of each architecture that has some.
        renamed: Former names, which timm still takes.
    """

    architectures: Mapping[str, str | None]
    tags: Mapping[str, frozenset[str]]
    renamed: frozenset[str]

    def refusal(self, name: str) -> str | None:
        """Return why a name, with or without a tag, cannot be a backbone; None where it may be one.

        What the model's parts have to say is left to ``trunk_of``.
        """
        architecture, dot, tag = name.partition(".")
        if name == EMBEDDED or architecture in self.renamed:
            return None
        if architecture not in self.architectures:
            usable = [each for each, kind in self.architectures.items() if kind is None or kind in FAMILIES]
            return unknown_backbone(name, [EMBEDDED, *usable])
        kind = self.architectures[architecture]
        if kind is not None and kind not in FAMILIES:
            return unsupported_backbone(name, kind)
        # Some files give one model's tags to another in a loop, so a tag of any model may be this one's.
        if dot and not any(tag in tags for tags in self.tags.values()):
            known = self.tags.get(architecture, frozenset())
            near = difflib.get_close_matches(tag, known, n=3) or sorted(known)[:3]
            advice = f"; did you mean {', '.join(f'{architecture}.{each}' for each in near)}?" if near else ""
            return f"unknown backbone '{name}': timm has no weights '{tag}' of {architecture}{advice}"
        return None


def unknown_backbone(name: str, known: list[str]) -> str:
    """Return what to say of a name that there is not."""
    architecture = name.partition(".")[0]
    parts = architecture.split("_")
    # Who mistypes a letter has the family right: names that begin alike come first.
    alike = [each for each in known if each.partition("_")[0] == parts[0]]
    close = [each for each in sorted(known, key=len) if len(architecture) >= 4 and each.startswith(architecture)]
    if not close and len(parts) < 3:
        # A misspelt stem, as vit_bass, is nearest to the beginnings of names, which end in patch and image size.
        stems = ["_".join(each.split("_")[: len(parts)]) for each in alike]
        stem = difflib.get_close_matches(architecture, stems, n=1)
        close = [each for each in sorted(alike, key=len) if stem and f"{each}_".startswith(f"{stem[0]}_")]
    if not close:
        close = difflib.get_close_matches(architecture, alike) or difflib.get_close_matches(architecture, known)
    close = close[:3]
    hint = f"did you mean {', '.join(close)}?" if close else "see timm.list_models('vit_*')"
    return f"unknown backbone '{name}'; {hint}"


def unsupported_backbone(name: str, kind: str, reason: str | None = None) -> str:
    """Return what to say of a model that prompts cannot enter.

    Args:
        name: The model's name.
        kind: Its class.
        reason: What is odd about its parts; None where its class is none of ``FAMILIES``.
    """
    if reason is None:
        advice = REFUSED.get(kind, f"prompts enter timm's {', '.join(FAMILIES)}")
        reason = f"it is a {kind}, {advice}"
    return (
        f"backbone '{name}' cannot take prompts: {reason}; "
        "docs/backbones.md lists what is supported, e.g. vit_base_patch16_224"
    )


@functools.cache
def read_catalogue() -> Catalogue | None:
    """Return what timm's sources say, or None where they are not there to be read."""
    found = importlib.util.find_spec("timm")
    folders = [] if found is None else found.submodule_search_locations or []
    texts = [
        file.read_text(encoding="utf-8", errors="replace")
        for folder in folders
        for file in sorted((Path(folder) / "models").glob("*.py"))
    ]
    architectures: dict[str, str | None] = {}
    tags: dict[str, set[str]] = {}
    renamed: set[str] = set()
    for text in texts:
        # A file builds one class, or says by a variable which one.
        built = set(_BUILT_CLASS.findall(text))
        kind = next(iter(built)) if len(built) == 1 else None
        kind = kind if kind is not None and kind[0].isupper() else None
        architectures |= dict.fromkeys(_ARCHITECTURE.findall(text), kind)
        for architecture, tag in _TAGGED.findall(text):
            tags.setdefault(architecture, set()).add(tag)
        renamed.update(*map(_KEY.findall, _RENAMED.findall(text)))
    if not architectures:
        return None
    return Catalogue(
        architectures=architectures,
        tags={name: frozenset(each) for name, each in tags.items()},
        renamed=frozenset(renamed),
    )
