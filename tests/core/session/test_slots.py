from __future__ import annotations

from dataclasses import replace

import pytest
from core import toy

from vpdeploy.errors import TableFullError, TaskNotFoundError
from vpdeploy.format.task import TaskCard
from vpdeploy.session.slots import TaskDirectory


def card(name: str) -> TaskCard:
    return replace(toy.prompt_set().card, name=name)


def admitted(directory: TaskDirectory, name: str, version: int | None = None) -> int:
    slot = directory.reserve()
    directory.admit(card(name), slot, version)
    return slot


def test_tasks_are_listed_as_they_were_added_with_their_versions():
    directory = TaskDirectory(3)
    admitted(directory, "b", 4)
    admitted(directory, "a")
    assert directory.tasks == ("b", "a")
    assert directory.versions() == {"b": 4, "a": None}


def test_a_full_directory_refuses_another_task():
    directory = TaskDirectory(1)
    admitted(directory, "a")
    assert directory.is_full
    with pytest.raises(TableFullError):
        directory.reserve()


def test_a_reserved_slot_can_be_given_back():
    directory = TaskDirectory(1)
    directory.give_back(directory.reserve())
    assert directory.reserve() == 0


def test_growth_adds_slots():
    directory = TaskDirectory(1)
    admitted(directory, "a")
    directory.extend(range(1, 3))
    assert {admitted(directory, "b"), admitted(directory, "c")} == {1, 2}


def test_an_unknown_task_is_named_together_with_the_known_ones():
    directory = TaskDirectory(1)
    with pytest.raises(TaskNotFoundError, match="no task 'x'; loaded: none"):
        directory.lease("x")
    admitted(directory, "a")
    with pytest.raises(TaskNotFoundError, match="no task 'x'; loaded: a"):
        directory.lease("x")
    with pytest.raises(TaskNotFoundError, match="nothing to remove"):
        directory.dismiss("x")


def test_a_dismissed_task_keeps_its_slot_until_the_last_lease_ends():
    directory = TaskDirectory(1)
    admitted(directory, "a")
    first, second = directory.lease("a"), directory.lease("a")
    directory.dismiss("a")
    assert directory.tasks == ()
    first.release()
    assert directory.is_full
    second.release()
    assert directory.reserve() == 0


def test_a_replaced_task_is_served_from_its_new_slot_while_old_requests_keep_theirs():
    directory = TaskDirectory(2)
    old_slot = admitted(directory, "a", 1)
    with directory.lease("a") as old:
        new_slot = admitted(directory, "a", 2)
        assert (old.slot, old.version) == (old_slot, 1)
        with directory.lease("a") as new:
            assert (new.slot, new.version) == (new_slot, 2)
        assert directory.is_full
    assert directory.reserve() == old_slot


def test_releasing_twice_ends_one_lease_only():
    directory = TaskDirectory(1)
    admitted(directory, "a")
    first, second = directory.lease("a"), directory.lease("a")
    directory.dismiss("a")
    first.release()
    first.release()
    assert directory.is_full
    second.release()
    assert not directory.is_full


def test_a_lease_ends_when_its_block_fails():
    directory = TaskDirectory(1)
    admitted(directory, "a")
    with pytest.raises(RuntimeError, match="boom"), directory.lease("a"):
        raise RuntimeError("boom")
    directory.dismiss("a")
    assert not directory.is_full
