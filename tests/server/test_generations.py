"""Tasks come and go in a table of few slots while they are asked: every answer is its own generation's."""

from __future__ import annotations

import itertools
import random
import threading
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import httpx
import numpy as np
import pytest
from server.running import TIMEOUT_S, serving, until
from server.toy_bundle import SIDE, encoded, prompt_set, write_toy_bundle

from vpdeploy import load
from vpdeploy.errors import TaskNotFoundError
from vpdeploy.format.promptset import CompiledPromptSet
from vpdeploy.server.settings import ServerSettings
from vpdeploy.serving.batcher import BatchSettings
from vpdeploy.session.session import Session

NAMES = tuple(f"task-{number}" for number in range(6))


def classes_of(generation: int) -> int:
    return 2 + generation % 3


def task_set(name: str, generation: int) -> CompiledPromptSet:
    """A task whose every logit is the generation, and half of the image's redness more."""
    labels = tuple(f"red-{generation}-{index}" for index in range(classes_of(generation)))
    toy = prompt_set(name, labels, scale=0.5)
    bias = np.full(len(labels), generation, np.float32)
    return replace(toy, tensors={**toy.tensors, "head_bias": bias})


class Turnover:
    """Adds and removes tasks, never more at a time than there are slots, and knows which generations there may be.

    Generations grow over all names together, so that none has the logits of another.
    """

    def __init__(self, session: Session, *, slots: int, seed: int) -> None:
        self.session = session
        self.slots = slots
        self.begun = dict.fromkeys(NAMES, 0)  # generations from here on have not been added yet
        self.settled = dict.fromkeys(NAMES, 0)  # generations before it have gone
        self.swaps: Counter[str] = Counter()
        self._generations = itertools.count(1)
        self._rng = random.Random(seed)

    def swap(self) -> None:
        """Replace a task, or have it make room for another, once a slot is free: the table must not grow."""
        tasks = self.session.tasks
        if len(tasks) < self.slots - 1:
            name, kind = self._rng.choice(NAMES), "added"
        elif self._rng.random() < 0.5:
            name, kind = self._rng.choice(tasks), "replaced"
        else:
            self.session.remove_task(self._rng.choice(tasks))
            name, kind = self._rng.choice(NAMES), "evicted"
        generation = next(self._generations)
        until(lambda: not self.session._directory.is_full)
        self.begun[name] = generation
        self.session.add_task(task_set(name, generation), version=generation)
        self.settled[name] = generation
        self.swaps[kind] += 1


@pytest.mark.parametrize(("slots", "seed"), [(2, 1), (3, 2), (4, 3)])
def test_every_answer_is_of_the_generation_that_it_names(tmp_path, slots, seed):
    zoo = write_toy_bundle(tmp_path / "zoo", {f"first-{index}": ("red", "green") for index in range(slots)}).path
    settings = ServerSettings(batching=BatchSettings(max_batch_size=8, max_delay_ms=0.2))
    answered: Counter[str] = Counter()
    slots_used: dict[int, set[int]] = {}
    stop = threading.Event()

    def ask_batcher(thread: int) -> None:
        rng, waiting = random.Random(thread), []
        while not stop.is_set():
            red = rng.choice((0, 255))
            image = np.full((SIDE, SIDE, 3), red, np.uint8)
            names = rng.choices(NAMES, k=3)
            oldest = {name: turnover.settled[name] for name in names}
            try:
                answers = server.service.batcher.submit_all([(image, name) for name in names])
            except TaskNotFoundError:
                answered["unknown"] += 1
                continue
            newest = {name: turnover.begun[name] for name in names}
            waiting += [
                (answer, name, oldest[name], newest[name], red) for answer, name in zip(answers, names, strict=True)
            ]
            while len(waiting) > 12:
                check(*waiting.pop(0))
        for each in waiting:
            check(*each)

    def check(answer: Future, name: str, oldest: int, newest: int, red: int) -> None:
        generation, logits = answer.version, answer.result(TIMEOUT_S)
        assert answer.card.name == name
        assert oldest <= generation <= newest
        assert logits.tolist() == [generation + red / 510] * classes_of(generation)
        slots_used.setdefault(answer.slot, set()).add(generation)
        answered["right"] += 1

    def ask_server(thread: int) -> None:
        rng = random.Random(thread)
        with httpx.Client(base_url=server.url, timeout=TIMEOUT_S) as client:
            while not stop.is_set():
                name = rng.choice(NAMES)
                oldest = turnover.settled[name]
                response = client.post(f"/v1/tasks/{name}:predict", content=encoded("red"))
                if response.status_code == 404:
                    continue
                answer = response.json()
                labels = {each["label"] for each in answer["predictions"]}
                generation = answer["version"]
                assert labels == {f"red-{generation}-{index}" for index in range(classes_of(generation))}
                assert oldest <= generation <= turnover.begun[name]
                answered["served"] += 1

    with load(zoo) as session, serving(session, settings) as server, ThreadPoolExecutor(4) as pool:
        for task in session.tasks:
            session.remove_task(task)
        turnover = Turnover(session, slots=slots, seed=seed)
        asking = [pool.submit(ask_batcher, thread) for thread in range(3)] + [pool.submit(ask_server, 3)]
        try:
            while sum(turnover.swaps.values()) < 150 or answered["right"] < 150 or answered["served"] < 5:
                turnover.swap()
                for each in asking:
                    assert not each.done(), each.result()
        finally:
            stop.set()
        for each in asking:
            each.result(TIMEOUT_S)
        assert session.describe().slots == slots
    assert min(len(generations) for generations in slots_used.values()) > 2
    assert set(turnover.swaps) >= {"replaced", "evicted"} - ({"replaced"} if slots == 2 else set())
