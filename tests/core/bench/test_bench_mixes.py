from __future__ import annotations

import numpy as np
import pytest

from vpdeploy.bench.mixes import MIXES, check_mix, draw_tasks
from vpdeploy.errors import SpecError


def drawn(mix: str, *, batch: int, tasks: int, seed: int = 0) -> list[int]:
    return draw_tasks(mix, batch=batch, tasks=tasks, rng=np.random.default_rng(seed)).tolist()


def test_zipf_shares_follow_the_power_law():
    # 2^-1.1 = 0.46652, 3^-1.1 = 0.29865, 4^-1.1 = 0.21764; with 1 they sum to 1.98281.
    expected = [0.504334, 0.235281, 0.150621, 0.109763]
    np.testing.assert_allclose(MIXES["zipf"](4), expected, atol=2e-6)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("tasks", [1, 3, 64])
def test_shares_of_every_mix_sum_to_one(mix: str, tasks: int):
    shares = MIXES[mix](tasks)
    assert shares.shape == (tasks,)
    assert shares.sum() == pytest.approx(1.0)


def test_uniform_gives_every_task_the_same_share():
    assert MIXES["uniform"](8).tolist() == [0.125] * 8


def test_rows_of_one_all_ask_the_same_task():
    assert drawn("one", batch=16, tasks=5) == [0] * 16


@pytest.mark.parametrize("seed", range(5))
def test_rows_of_distinct_all_differ(seed: int):
    assert len(set(drawn("distinct", batch=32, tasks=64, seed=seed))) == 32
    assert sorted(drawn("distinct", batch=64, tasks=64, seed=seed)) == list(range(64))


def test_the_same_seed_draws_the_same_tasks():
    first, again, other = (drawn("zipf", batch=64, tasks=1024, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_drawn_tasks_are_slot_numbers():
    tasks = draw_tasks("uniform", batch=100, tasks=7, rng=np.random.default_rng(0))
    assert tasks.dtype == np.int32
    assert set(tasks.tolist()) == set(range(7))


@pytest.mark.parametrize(
    ("mix", "batch", "tasks", "message"),
    [
        ("all", 1, 9, "unknown mix 'all'; choose from: one, uniform, zipf, distinct"),
        ("distinct", 32, 31, "a batch of 32 needs 32 tasks, zoo has 31; --tasks 32 fills"),
        ("uniform", 1, 1, "at least 2 tasks are needed, zoo has 1"),
        ("zipf", 8, 1, "at least 2 tasks are needed, zoo has 1"),
    ],
)
def test_a_mix_that_cannot_be_made_is_refused(mix: str, batch: int, tasks: int, message: str):
    with pytest.raises(SpecError, match=message.replace("(", r"\(")):
        check_mix(mix, batch=batch, tasks=tasks, name="zoo")


def test_a_mix_that_can_be_made_is_accepted():
    for mix, batch, tasks in (("one", 32, 1), ("uniform", 32, 2), ("zipf", 1, 2), ("distinct", 32, 32)):
        check_mix(mix, batch=batch, tasks=tasks, name="zoo")
