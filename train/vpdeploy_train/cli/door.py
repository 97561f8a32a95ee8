"""What a command line gets wrong that can be told without torch, whose import takes seconds: names, folders, data."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from vpdeploy.errors import SpecError
from vpdeploy.format.run import ARGS_FILE
from vpdeploy.format.task import check_task_name
from vpdeploy_train.architectures import check_plain_name, is_plain_name
from vpdeploy_train.catalogue import read_catalogue
from vpdeploy_train.config import read_toml
from vpdeploy_train.data.resolve import absolute_spec, data_place, missing_data
from vpdeploy_train.methods import METHODS
from vpdeploy_train.place import check_begun, check_new_place, choose_task_name
from vpdeploy_train.recipes import recipe_named
from vpdeploy_train.settings import default_of
from vpdeploy_train.tensorfile import file_damage, unreadable

_VALUES: Final = ("out", "name", "config", "search", "study", "data", "recipe", "method", "backbone", "weights")
_FLAGS: Final = ("resume", "help")


def values_in(arguments: Sequence[str]) -> dict[str, str]:
    """Return what a command line says of the options that are looked at here; flags that are given are empty texts.

    The rest of the options is not known yet, so this is no check of the usage: what looks wrong is left to Typer.
    """
    found: dict[str, str] = {}
    rest = iter(arguments)
    for argument in rest:
        if argument == "--":
            break
        name, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--"):
            continue
        if name in _FLAGS and not equals:
            found[name] = ""
        elif name in _VALUES and (equals or (value := next(rest, "--")) != "--"):
            found[name] = value
    return found


def check_training(arguments: Sequence[str]) -> None:
    """Check the command line behind ``vpdeploy train``.

    Raises:
        SpecError: A name, folder or file is wrong.
    """
    given = values_in(arguments)
    if "help" in given:
        return
    resume = "resume" in given
    if "name" in given:
        check_task_name(given["name"])
    stored: Mapping[str, Any] = {}
    if "out" in given:
        out = Path(given["out"])
        check_begun(out) if resume else check_new_place(out)
        choose_task_name(out, name=given.get("name"), resume=resume)
        if resume:
            stored = read_toml(out / ARGS_FILE)
            if "data" not in given and (missing := missing_data(str(stored.get("data", "digits")))):
                raise SpecError(f"{out}: its data {missing}: put the data there, or a symbolic link to them")
    _check_settings(given, stored=stored, spec_is_stored=resume and "data" not in given)


def check_sweep(arguments: Sequence[str]) -> None:
    """Check the command line behind ``vpdeploy sweep``.

    Raises:
        SpecError: A name, folder or file is wrong.
    """
    given = values_in(arguments)
    if "help" in given:
        return
    if "study" in given:
        check_study_name(given["study"])
    if "out" in given and Path(given["out"]).exists() and not Path(given["out"]).is_dir():
        raise SpecError(f"--out {given['out']}: exists and is no folder; give another --out")
    if "search" in given:
        read_toml(Path(given["search"]))
    _check_settings(given, stored={}, spec_is_stored=False)


def check_study_name(name: str) -> None:
    """Check the name of a sweep's study, which is that of its trials' tasks, too.

    Raises:
        SpecError: It cannot name a task.
    """
    try:
        check_task_name(name)
    except SpecError as error:
        raise SpecError(f"--study {error}; it is the name of the trials' tasks, too") from None


def check_backbone_name(name: str) -> None:
    """Check a backbone's name; the model itself may still be refused.

    Raises:
        SpecError: There is none of that name, or prompts cannot enter it.
    """
    if is_plain_name(name):
        check_plain_name(name)
        return
    # Who has imported timm already, or brings packages that may, can have models that its sources do not name.
    catalogue = None if "timm" in sys.modules or METHODS.are_extended else read_catalogue()
    if catalogue is not None and (refusal := catalogue.refusal(name)) is not None:
        raise SpecError(refusal)


def check_file(path: Path) -> None:
    """Check that a file is there.

    Raises:
        SpecError: It is not, or it is a folder.
    """
    if not path.is_file():
        raise SpecError(f"{path}: {'is a folder, expected a file' if path.is_dir() else 'file not found'}")


def check_weights(path: Path) -> None:
    """Check that a file of weights is there, and that nothing is plainly wrong with it.

    Raises:
        SpecError: It is not there, cut off, text, or an archive of other things.
    """
    check_file(path)
    try:
        damage = file_damage(path)
    except OSError as error:
        damage = error.strerror or type(error).__name__
    if damage is not None:
        raise SpecError(unreadable(path, damage))


def check_data(spec: str) -> None:
    """Check that a data spec is one, and that its folder or file is there.

    Raises:
        SpecError: It is unknown, or nothing is there.
    """
    absolute_spec(spec)
    place = data_place(spec)
    if place is not None and not place.exists():
        raise SpecError(f"--data '{spec}': {place} is not there")


def _check_settings(given: Mapping[str, str], *, stored: Mapping[str, Any], spec_is_stored: bool) -> None:
    """Check recipe, method, backbone and data, wherever they come from."""
    layers: list[Mapping[str, Any]] = [stored, read_toml(Path(given["config"])) if "config" in given else {}, given]

    def last(name: str) -> str | None:
        found = [layer[name] for layer in layers if isinstance(layer.get(name), str)]
        return found[-1] if found else None

    recipe, method = last("recipe"), last("method") or default_of("method")
    if recipe is not None:
        layers.insert(0, recipe_named(recipe).shared)
    for name in filter(None, (each.strip() for each in method.split(","))):
        METHODS.require(name)
    backbone, weights = last("backbone") or default_of("backbone"), last("weights")
    check_backbone_name(backbone)
    if weights is not None:
        check_weights(Path(weights).expanduser())
    elif is_plain_name(backbone):
        raise SpecError(f"backbone '{backbone}' has no pretrained weights: give a state dict with --weights FILE")
    data = last("data")
    if data is not None and not spec_is_stored:
        check_data(data)
