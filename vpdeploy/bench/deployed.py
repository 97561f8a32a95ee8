"""A bundle or a folded model as a subject: what a server would run."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np

from vpdeploy.backends import open_backend
from vpdeploy.backends.protocol import Backend
from vpdeploy.bench.mixes import ONE, check_mix, draw_tasks
from vpdeploy.bench.subject import BatchRun, Cell, SubjectFacts
from vpdeploy.errors import SpecError
from vpdeploy.format.artifact import Artifact
from vpdeploy.format.promptset import CompiledPromptSet
from vpdeploy.session.batch_size import noted_batch_size
from vpdeploy.session.session import Session

DRAWS = 16
"""Batches of task numbers that are drawn beforehand and used by turns."""


class DeployedSubject:
    """A bundle or a folded model, run through ``Session.run``.

    Args:
        artifact: What to load.
        name: What reports call it.
        runtime: A name in ``vpdeploy.backends.RUNTIMES``, or ``auto``.
        threads: CPU threads inside one run; None leaves it to the runtime.
        tasks: How many slots of a bundle's table to fill, with its tasks and then with copies of them under other
            names; None fills one for each of its tasks.

    Raises:
        SpecError: A folded model is to have several tasks, or there is no runtime of that name.
        BackendError: The runtime does not work here, or cannot load the graph.
        BundleError: A prompt set is damaged.
    """

    fixed_batch = None

    def __init__(self, artifact: Artifact, *, name: str, runtime: str, threads: int | None, tasks: int | None) -> None:
        self.name = name
        self._artifact = artifact
        if not artifact.tasks:
            raise SpecError(f"{artifact.path}: holds no task; add one with vpdeploy task add")
        self._own_tasks = len(artifact.tasks)
        filled = artifact
        if artifact.is_switchable and tasks is not None:
            filled = artifact.with_prompt_sets(fill_up(list(artifact.read_prompt_sets()), tasks))
        self.tasks = len(filled.tasks)
        self._backend: Backend = open_backend(artifact, runtime=runtime, threads=threads)
        self._session = Session(filled, self._backend)
        # A slot may be used while its lease is held; nothing is ever removed here, so they are never released.
        self._slots = np.array([self._session.lease(task).slot for task in self._session.tasks], dtype=np.int32)

    def prepare(self, cell: Cell, seed: int) -> BatchRun:
        """See ``Subject.prepare``; a model of one task runs every mix alike."""
        mix = cell.mix if self._artifact.is_switchable else ONE
        check_mix(mix, batch=cell.batch, tasks=self.tasks, name=self.name)
        rng = np.random.default_rng(seed)
        size = self._artifact.preprocessing.image_size
        drawn = [self._slots[draw_tasks(mix, batch=cell.batch, tasks=self.tasks, rng=rng)] for _ in range(DRAWS)]
        turns = itertools.cycle(drawn)
        if self._artifact.image_input == "uint8":
            pixels = rng.integers(0, 256, (cell.batch, size, size, 3), dtype=np.uint8)
            return lambda: self._session.run(pixels, next(turns))
        normalised = rng.standard_normal((cell.batch, 3, size, size), dtype=np.float32)
        # A pipeline that exports with --input float normalises by itself: that is no part of the graph's time.
        return lambda: self._backend.run(normalised, None)

    def facts(self) -> SubjectFacts:
        """See ``Subject.facts``."""
        artifact, described = self._artifact, self._session.describe()
        return SubjectFacts(
            name=self.name,
            kind="bundle" if artifact.is_switchable else "folded model",
            path=str(artifact.path),
            opset=artifact.opset,
            graph_bytes=artifact.graph_bytes,
            input=str(self._backend.input_dtype),
            tasks=self.tasks,
            copied_tasks=max(0, self.tasks - self._own_tasks),
            runtime=described.runtime,
            precision=described.precision,
            image_size=(described.image_size, described.image_size),
            slots=described.slots,
            slot_bytes=described.slot_bytes,
            table_bytes=described.table_bytes,
            batch_size=noted_batch_size(self._session),
        )

    def close(self) -> None:
        """See ``Subject.close``."""
        self._session.close()


def fill_up(prompt_sets: list[CompiledPromptSet], count: int) -> list[CompiledPromptSet]:
    """Return so many prompt sets: the given ones, then copies of them by turns under names of their own.

    Copies share the tensors' memory; a table holds each in a slot of its own.
    """
    filled = list(prompt_sets[:count])
    taken = {prompt_set.card.name for prompt_set in prompt_sets}
    numbers = itertools.count(1)
    while len(filled) < count:
        original = prompt_sets[len(filled) % len(prompt_sets)]
        name = next(name for number in numbers if (name := f"copy-{number}") not in taken)
        filled.append(replace(original, card=replace(original.card, name=name)))
    return filled
