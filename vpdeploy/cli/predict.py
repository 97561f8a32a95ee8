"""``vpdeploy predict``: classify images from the command line."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vpdeploy.backends import AUTO, check_runtime
from vpdeploy.cli import exits
from vpdeploy.cli.runtimes import RuntimeOption
from vpdeploy.cli.signals import Stopped
from vpdeploy.cli.threads import Threads
from vpdeploy.errors import InputError, SpecError, TaskNotFoundError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from vpdeploy.cli.answers import AnswerWriter
    from vpdeploy.cli.image_names import NamedImage
    from vpdeploy.format.preprocessing import Preprocessing
    from vpdeploy.progress import ProgressBar
    from vpdeploy.session.prediction import Prediction
    from vpdeploy.session.session import Session

_MANY = 100
"""Of so many images it is said how fast they were answered."""

_MOST_TASKS = 20


def predict(
    model: Annotated[Path, typer.Argument(help="A bundle folder, or a task's .onnx file.", show_default=False)],
    images: Annotated[
        list[str],
        typer.Argument(
            help="Image files, folders, quoted patterns ('**/*.jpg'); -: paths on stdin.", show_default=False
        ),
    ],
    task: Annotated[str | None, typer.Option(help="The task to ask; needed if the bundle holds several.")] = None,
    top: Annotated[int, typer.Option(min=1, help="How many classes to name for each image.")] = 5,
    out: Annotated[
        Path | None,
        typer.Option(help="Write the answers to FILE.csv or FILE.jsonl; one that is there is replaced at the end."),
    ] = None,
    runtime: RuntimeOption = AUTO,
    threads: Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print the most probable classes of each image, or write them to a file.

    An image that cannot be read is named on stderr, the others are answered; the exit code is then 1.
    """
    from vpdeploy.cli.answers import FILE_WRITERS, JsonWriter, TextWriter, check_out
    from vpdeploy.cli.image_names import STDIN, find_images
    from vpdeploy.files import replacing_file
    from vpdeploy.progress import ProgressBar
    from vpdeploy.session.stream import answer_each

    # What is cheap to find out comes before the graph is loaded. Stdin may go on for as long as it likes.
    check_runtime(runtime)
    if out is not None:
        check_out(out)
    found = find_images(images)
    named = None if STDIN in images else list(found)

    writers: list[AnswerWriter] = []
    if as_json:
        writers.append(JsonWriter(sys.stdout))
    elif out is None:
        writers.append(TextWriter(sys.stdout))

    bar = ProgressBar("predicting")
    tally = _Tally(bar, total=None if named is None else len(named), writers=writers)
    try:
        with bar, contextlib.ExitStack() as stack:
            if named is not None and all(each.problem for each in named):
                # None is left to ask a model about.
                for each in named:
                    tally.take(each.name, _refusal(each))
            else:
                target = None if out is None else stack.enter_context(replacing_file(out))
                session = stack.enter_context(_open_session(model, task, runtime=runtime, threads=threads))
                lease = stack.enter_context(session.lease(_choose_task(session.tasks, task)))
                if out is not None and target is not None:
                    text = target.open("w", encoding="utf-8", errors="backslashreplace", newline="")
                    stream = stack.enter_context(text)
                    writers.append(FILE_WRITERS[out.suffix.lower()](stream, lease.card, top))
                tally.start()
                read = partial(_read, session.preprocessing)
                answers = answer_each(named or found, read, lease, session.run, top=top)
                for each, answer in stack.enter_context(contextlib.closing(answers)):
                    tally.take(each.name, answer)
            tally.finish()
    except KeyboardInterrupt:
        raise Stopped(tally.describe(out)) from None
    tally.report(out)
    if tally.refused:
        raise typer.Exit(exits.KNOWN_ERROR)


def _open_session(model: Path, task: str | None, *, runtime: str, threads: int | None) -> Session:
    """Open a model after a look at its tasks: a misspelt one should not have to wait for the graph."""
    from vpdeploy.format.artifact import Artifact
    from vpdeploy.format.bundle import read_consistently
    from vpdeploy.session.session import Session

    def open_checked() -> Session:
        artifact = Artifact.open(model)
        _choose_task(artifact.tasks, task)
        return Session.of(artifact, runtime=runtime, threads=threads)

    return read_consistently(model, open_checked)


def _choose_task(tasks: Sequence[str], asked: str | None) -> str:
    """Return the task to ask.

    Raises:
        SpecError: None was named, and there are several, or none.
        TaskNotFoundError: There is no task of that name.
    """
    listed = ", ".join([*tasks[:_MOST_TASKS], *(["..."] if len(tasks) > _MOST_TASKS else [])]) or "none"
    if asked is None:
        if len(tasks) == 1:
            return tasks[0]
        if not tasks:
            raise SpecError("the bundle holds no task; add one with vpdeploy task add")
        raise SpecError(f"several tasks are loaded, name one of: {listed} (--task NAME)")
    if asked not in tasks:
        spellings = {each.casefold(): each for each in tasks}
        close = get_close_matches(asked.casefold(), spellings, n=1)
        hint = f" (did you mean '{spellings[close[0]]}'?)" if close else ""
        raise TaskNotFoundError(f"no task '{asked}'{hint}; loaded: {listed}")
    return asked


def _read(preprocessing: Preprocessing, image: NamedImage) -> npt.NDArray[np.uint8]:
    """Return the pixels of an image, uint8 [H, W, 3].

    Raises:
        InputError: There is no such image, or it cannot be read.
    """
    from vpdeploy.image import load_pixels

    if image.problem is not None:
        raise _refusal(image)
    return load_pixels(Path(image.name), preprocessing)


def _refusal(image: NamedImage) -> InputError:
    return InputError(f"{image.name}: {image.problem}")


class _Tally:
    """Writes answers down as they come, names images that have none, and counts both.

    Args:
        bar: Shows how far it is, unless answers that scroll by on the terminal do.
        total: How many images there are; None where nobody knows yet.
        writers: What writes the answers; more may join before the first comes.
    """

    def __init__(self, bar: ProgressBar, *, total: int | None, writers: list[AnswerWriter]) -> None:
        self._bar = bar
        self._total = total
        self._writers = writers
        self._scrolls = bool(writers) and sys.stdout.isatty()
        self._started_at = time.monotonic()
        self._spent_s = 0.0
        self.done = 0
        self.refused = 0

    def start(self) -> None:
        """Measure the pace from now on."""
        self._started_at = time.monotonic()

    def take(self, image: str, answer: Prediction | InputError) -> None:
        """Write down the answer for one image, or what is wrong with it."""
        from vpdeploy.cli.answers import one_line, reason_of

        if isinstance(answer, InputError):
            self.refused += 1
            line = f"error: {one_line(image)}: {reason_of(image, answer)}"
            if self._bar.on_terminal:
                self._bar.print_line(line)
            else:
                typer.echo(line, err=True)
        for writer in self._writers:
            writer.write(image, answer)
        sys.stdout.flush()
        self.done += 1
        if not self._scrolls:
            self._bar.count(self.done, self._total)

    def finish(self) -> None:
        """Write what stands behind the last answer.

        Raises:
            SpecError: There was no image.
        """
        if not self.done:
            raise SpecError("no images: stdin names none")
        self._spent_s = time.monotonic() - self._started_at
        for writer in self._writers:
            writer.finish()

    def describe(self, out: Path | None) -> str:
        """Return how far it has come, for who ends it before the end."""
        total = "" if self._total is None else f" of {self._total:,}"
        unwritten = "" if out is None else f", {out} was not written"
        return f"{self.done:,}{total} images were answered{unwritten}"

    def report(self, out: Path | None) -> None:
        """Say on stderr how many images were answered, where that is not plain to see."""
        answered = self.done - self.refused
        if out is not None and answered:
            typer.echo(f"wrote {out}: {self.done:,} images", err=True)
        if answered >= _MANY:
            typer.echo(
                f"{answered:,} images in {self._spent_s:.1f} s: {answered / self._spent_s:.0f} a second", err=True
            )
        if self.refused and self.done > 1:
            typer.echo(f"error: {self.refused:,} of {self.done:,} images could not be read", err=True)
