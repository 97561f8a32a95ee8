"""From a data spec to a data source: one class map, and a validation part where there is none."""

from __future__ import annotations

import logging
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Final

from vpdeploy.errors import SpecError
from vpdeploy.progress import ProgressBar
from vpdeploy.tree import is_hidden, natural_key
from vpdeploy_train.data import digits, folder, huggingface, manifest, shapes, splitfolder, vtab
from vpdeploy_train.data.address import Address
from vpdeploy_train.data.collection import UNSPLIT, Collection, Format, Item
from vpdeploy_train.data.example import SPLITS, DataSource, Example
from vpdeploy_train.data.listing import listening
from vpdeploy_train.data.partition import carve

_log = logging.getLogger("vpdeploy.train")

FORMATS: Final[tuple[Format, ...]] = (
    digits.FORMAT,
    shapes.FORMAT,
    vtab.FORMAT,
    huggingface.FORMAT,
    manifest.FORMAT,
    splitfolder.FORMAT,
    folder.FORMAT,
)
"""Every data format; the first that a spec matches reads it."""

FINAL_SUFFIX: Final = "#final"
"""At the end of a spec: train on the validation images, too."""

TEST_FRACTION: Final = 0.2
"""Share of each class that becomes the test split of data without splits."""


def resolve_data(spec: str, *, seed: int, val_fraction: float = 0.2, labels: Sequence[str] | None = None) -> DataSource:
    """Read a data set.

    Data without splits is divided, stratified by class, into ``test`` (a fifth), ``val`` (``val_fraction`` of the
    rest) and ``train``. Data with a ``train`` but no ``val`` split has ``val`` carved out of ``train``. The same
    spec, seed and fraction give the same splits again. ``digits`` and ``shapes`` have fixed splits. With ``#final``
    behind a spec the validation images are part of ``train``, and ``val`` is empty.

    Args:
        spec: ``DIR``, ``FILE.csv``, ``FILE.json``, ``FILE.jsonl``, ``vtab:DIR``, ``hf:NAME[:CONFIG]``,
            ``digits[:TASK]`` or ``shapes:TASK``, each perhaps followed by ``#final``.
        seed: Decides which images are carved.
        val_fraction: Share of each class of ``train`` to carve for validation, in [0, 1); 0 leaves ``val`` empty.
        labels: The class map of a run, so that indices match it; by default the format's own, or the sorted classes
            of ``train``.

    Raises:
        SpecError: The spec is unknown, or its data cannot be used; the message names the file or folder.
        MissingExtraError: A library that the format needs is not installed.
    """
    # Read the images by class name, and number the classes.
    if not 0 <= val_fraction < 1:
        raise SpecError(f"the validation fraction is {val_fraction}; expected at least 0 and less than 1")
    address, final = _without_final(spec)
    with ProgressBar("listing images") as bar, listening(bar.count):
        collection = _find_format(address).read(address)
    label_names = _class_map(spec, collection, labels)
    parts = {
        split: _number(spec, split, items, label_names, given=labels is not None)
        for split, items in collection.splits.items()
    }

    # Where the format names no splits, hold out a test part.
    carved: list[str] = []
    if UNSPLIT in parts:
        whole = parts.pop(UNSPLIT)
        least = 3 if val_fraction > 0 and not final else 2
        _require_images(spec, whole, label_names, least, "a train, val and test part")
        parts["train"], parts["test"] = carve(whole, TEST_FRACTION, seed=seed)
        carved.append("test")

    # Join the validation images to the training, or make sure that there are some.
    if final:
        parts["train"] = (*parts.get("train", ()), *parts.pop("val", ()))
    elif not parts.get("val") and parts.get("train") and val_fraction > 0:
        _require_images(spec, parts["train"], label_names, 2, "a train and val part")
        parts["train"], parts["val"] = carve(parts["train"], val_fraction, seed=seed)
        carved.append("val")

    return DataSource(
        spec=spec,
        labels=label_names,
        train=parts.get("train", ()),
        val=parts.get("val", ()),
        test=parts.get("test", ()),
        augmentation=collection.augmentation,
        carved=tuple(carved),
    )


def absolute_spec(spec: str) -> str:
    """Return a spec that names the same data from every directory; a name that is no path stays as it is.

    Raises:
        SpecError: The spec is unknown.
    """
    address, final = _without_final(spec)
    located = _find_format(address).locate(address)
    return spec if located is None else located.absolute() + final


def is_same_data(before: str, now: str) -> bool:
    """Tell whether two specs name the same data, perhaps in other spellings: ``x/``, ``~/x``, a symbolic link.

    Where ``before`` is relative to a directory that is not known any more, it is the end of ``now`` that counts.
    """
    if before == now:
        return True
    old, new = _locate(before), _locate(now)
    if old is None or new is None:
        return False
    return old.resolved() == new.resolved() or (old.is_lost and new.ends_like(old))


def missing_data(spec: str) -> str | None:
    """Return what to say of a spec whose folder or file is not there; None where it is, or where it is no path.

    What stands behind the semicolon tells of this machine.
    """
    located = _locate(spec)
    if located is None or located.exists:
        return None
    if located.is_lost:
        return f"'{spec}' is not there; the path is relative to where the training was started, this is {Path.cwd()}"
    return f"'{spec}' is not there; it was moved or deleted"


def data_place(spec: str) -> Path | None:
    """Return the folder or file of a spec, whether it is there or not; None where it names none."""
    located = _locate(spec)
    return None if located is None else located.place


def _locate(spec: str) -> Address | None:
    """Take a spec apart at its path; one that no format matches is taken for a folder that is gone."""
    address, final = _without_final(spec)
    try:
        located = _find_format(address).locate(address)
    except SpecError:
        located = Address(path=Path(address))
    return None if located is None else replace(located, after=located.after + final)


def _without_final(spec: str) -> tuple[str, str]:
    """Return a spec without ``#final``, and ``#final`` where it has that."""
    address = spec.removesuffix(FINAL_SUFFIX)
    return address, spec[len(address) :]


def _find_format(spec: str) -> Format:
    """Return the format that a spec is meant for."""
    try:
        for candidate in FORMATS:
            if candidate.matches(spec):
                if candidate.names and spec not in candidate.names:
                    raise SpecError(f"unknown task '{spec}'; expected one of: {', '.join(candidate.names)}")
                return candidate
        is_file = bool(spec) and Path(spec).expanduser().is_file()
    except (OSError, RuntimeError) as error:  # a name too long for the system, or an unknown ~user
        raise SpecError(f"data '{spec[:80]}' cannot be looked up ({error.args[-1]})") from error
    spellings = dict.fromkeys(candidate.spelling for candidate in reversed(FORMATS))
    found = "a file of another kind" if is_file else "no file or folder there"
    near = None if is_file else _nearest(spec)
    hint = f", did you mean '{near}'?" if near is not None else ""
    raise SpecError(f"unknown data '{spec}' ({found}{hint}); expected one of: {', '.join(spellings)}")


def _nearest(spec: str) -> str | None:
    """Return the spec that was perhaps meant: a name of the built-in data, or what lies beside the missing path."""
    path = Path(spec)
    try:
        beside = [str(path.parent / each.name) for each in path.expanduser().parent.iterdir() if not is_hidden(each)]
    except OSError:
        beside = []
    spelled = {name.casefold(): name for name in (*beside, *(name for each in FORMATS for name in each.names))}
    close = get_close_matches(str(path).casefold(), spelled, n=1, cutoff=0.75)
    return spelled[close[0]] if close else None


def _class_map(spec: str, collection: Collection, labels: Sequence[str] | None) -> tuple[str, ...]:
    """Return the class names in index order: those given, the format's own, or those of the training images."""
    if labels is not None:
        repeated = [name for name, count in Counter(labels).items() if count > 1]
        if repeated or not labels:
            raise SpecError(f"{spec}: the given labels are {f'not unique ({repeated[0]!r})' if labels else 'empty'}")
        return tuple(labels)
    items = collection.splits.get(UNSPLIT) or collection.splits.get("train")
    if not items:
        found = ", ".join(split for split in SPLITS if collection.splits.get(split)) or "no images at all"
        raise SpecError(f"{spec}: no training images; expected a train split, found {found}")
    names = sorted({composed(item.class_name) for item in items}, key=natural_key)
    if len(names) < 2:
        raise SpecError(f"{spec}: the training images have the one class '{names[0]}'; expected at least two classes")
    if collection.labels:
        return collection.labels
    folded: dict[str, str] = {}
    for name in names:
        if (other := folded.setdefault(name.casefold(), name)) != name:
            _log.warning("%s: classes '%s' and '%s' differ in upper and lower case alone", spec, other, name)
    return tuple(names)


def _number(
    spec: str, split: str, items: Sequence[Item], labels: tuple[str, ...], *, given: bool
) -> tuple[Example, ...]:
    """Turn class names into indices."""
    indices = {composed(name): index for index, name in enumerate(labels)}
    strangers = sorted({composed(item.class_name) for item in items} - indices.keys(), key=natural_key)
    if strangers:
        owner = "the run's labels have" if given else "train has"
        shown = ", ".join(f"'{name}'" for name in strangers[:3]) + (", ..." if len(strangers) > 3 else "")
        folded = {name.casefold(): name for name in labels}
        if (alike := folded.get(strangers[0].casefold())) is not None:
            shown += f" (not '{alike}': upper and lower case count)"
        where = "the data" if split == UNSPLIT else f"split '{split}'"
        raise SpecError(
            f"{spec}: {where} holds images of {shown}, which is not among the {len(labels)} classes that {owner}: "
            "remove these images or correct their labels"
        )
    return tuple(Example(source=item.source, label=indices[composed(item.class_name)]) for item in items)


def composed(name: str) -> str:
    """Return a class name in Unicode's composed form: some systems write ``é`` as one character, others as two."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def _require_images(spec: str, examples: Sequence[Example], labels: tuple[str, ...], least: int, parts: str) -> None:
    """Refuse classes that are too small to be divided."""
    counts = Counter(example.label for example in examples)
    small = [(labels[label], count) for label, count in sorted(counts.items()) if count < least]
    if small:
        name, count = small[0]
        others = f" (and {len(small) - 1} more classes like it)" if len(small) > 1 else ""
        raise SpecError(
            f"{spec}: class '{name}' has {count} image{'s' if count > 1 else ''}{others}; at least {least} are "
            f"needed to make {parts}: add images, or name the splits in the data"
        )
