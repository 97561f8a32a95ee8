"""The forms that answers are written in, one image at a time: text, JSON, JSON lines and CSV."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Protocol, TextIO, TypeAlias

from vpdeploy.errors import InputError, SpecError
from vpdeploy.format.task import TaskCard
from vpdeploy.session.prediction import Prediction

Answer: TypeAlias = Prediction | InputError

_RANKED = ("label", "probability")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


class AnswerWriter(Protocol):
    """Writes answers to a stream, which it leaves open."""

    def write(self, image: str, answer: Answer) -> None:
        """Write the answer for one image, or why there is none."""

    def finish(self) -> None:
        """Write what stands behind the last answer."""


class TextWriter:
    """A line for each image and one for each of its classes; images without an answer are left out.

    Args:
        stream: Where the answers go.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, image: str, answer: Answer) -> None:
        """Write the answer for one image."""
        if isinstance(answer, InputError):
            return
        classes = [f"  {each.probability:7.2%}  {each.label}\n" for each in answer.ranking]
        self._stream.write("".join([f"{one_line(image)}  ({answer.task})\n", *classes]))

    def finish(self) -> None:
        """Write nothing: no line stands behind the last answer."""


class JsonWriter:
    """One array with an object for each image.

    Args:
        stream: Where the answers go.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._before = "[\n"

    def write(self, image: str, answer: Answer) -> None:
        """Write the object of one image."""
        row = json.dumps(_object_of(image, answer), indent=2, ensure_ascii=False)
        self._stream.write(_encodable(self._before + "\n".join(f"  {line}" for line in row.split("\n"))))
        self._before = ",\n"

    def finish(self) -> None:
        """End the array."""
        self._stream.write("[]\n" if self._before == "[\n" else "\n]\n")


class JsonLinesWriter:
    """An object for each image, each on a line of its own.

    Args:
        stream: Where the answers go.
        card: The task that is asked.
        top: How many classes are named at most.
    """

    def __init__(self, stream: TextIO, card: TaskCard, top: int) -> None:
        self._stream = stream

    def write(self, image: str, answer: Answer) -> None:
        """Write the line of one image."""
        row = _object_of(image, answer)
        self._stream.write(_encodable(json.dumps(row, ensure_ascii=False)) + "\n")

    def finish(self) -> None:
        """Write nothing: a list of lines needs no end."""


class CsvWriter:
    """A row for each image: its name, the task, the classes in falling order of probability, and what is wrong with it.

    Args:
        stream: Where the rows go; it must not translate line ends.
        card: The task that is asked; the header, which is written at once, has as many classes as it at most.
        top: How many classes are named at most.
    """

    def __init__(self, stream: TextIO, card: TaskCard, top: int) -> None:
        self._task = card.name
        # Python 3.12 and older quote no carriage return of themselves; quoting every text is right with all of them.
        self._rows = csv.writer(stream, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
        ranks = range(1, 1 + min(top, len(card.labels)))
        self._names = [tuple(f"{name}_{rank}" if rank > 1 else name for name in _RANKED) for rank in ranks]
        self._rows.writerow(["image", "task", *(name for names in self._names for name in names), "error"])

    def write(self, image: str, answer: Answer) -> None:
        """Write the row of one image."""
        if isinstance(answer, InputError):
            cells: list[Any] = [""] * (2 * len(self._names)) + [reason_of(image, answer)]
        else:
            cells = [cell for each in answer.ranking for cell in (each.label, each.probability)] + [""]
        self._rows.writerow([image, self._task, *cells])

    def finish(self) -> None:
        """Write nothing: a table needs no end."""


FILE_WRITERS: Final[Mapping[str, Callable[[TextIO, TaskCard, int], AnswerWriter]]] = {
    ".csv": CsvWriter,
    ".jsonl": JsonLinesWriter,
}
"""What writes a file of answers, by the file's ending."""


def check_out(path: Path) -> None:
    """Check that answers can be written to a file, before any are made.

    Raises:
        SpecError: Its ending names no form, there is no such folder, or something else has that name.
    """
    if path.suffix.lower() not in FILE_WRITERS:
        raise SpecError(f"--out {path}: expected a file that ends in {' or '.join(FILE_WRITERS)}")
    if path.exists() and not path.is_file():
        raise SpecError(f"--out {path}: is there and is not a file; name another one")
    if not path.parent.is_dir():
        raise SpecError(f"--out {path}: there is no folder {path.parent}; make it first")


def reason_of(image: str, error: InputError) -> str:
    """Return in one line what is wrong with an image, without its name."""
    return " ".join(str(error).removeprefix(f"{image}: ").split())


def one_line(name: str) -> str:
    """Return a name with escapes in the place of line breaks, other control characters and bytes that are no text."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), name)


def _encodable(document: str) -> str:
    """Return JSON that any stream of UTF-8 takes: bytes of a name that are no text become escapes, which it reads."""
    return document.encode("utf-8", "backslashreplace").decode("utf-8")


def _object_of(image: str, answer: Answer) -> dict[str, Any]:
    """Return what JSON says of one image."""
    if isinstance(answer, InputError):
        return {"image": image, "error": reason_of(image, answer)}
    ranking = [{"label": each.label, "index": each.index, "probability": each.probability} for each in answer.ranking]
    return {"image": image, "task": answer.task, "predictions": ranking}
