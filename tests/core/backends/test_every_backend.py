"""What every runtime has to do. The native runner also runs on a device in the host's memory."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from core.backends.cases import GPU_RUNTIMES
from core.backends.tables import MakePixels, Reference, prompt_set, slots, table

from vpdeploy.backends import RUNTIMES
from vpdeploy.backends.protocol import Backend
from vpdeploy.errors import BackendError, InputError
from vpdeploy.format.artifact import Artifact
from vpdeploy.machine import gpu_obstacle


@pytest.mark.gpu
@pytest.mark.parametrize("runtime", GPU_RUNTIMES)
def test_runtimes_that_need_a_gpu_are_tested_where_there_is_one(runtime: str, artifact: Artifact):
    if gpu_obstacle() is not None:
        pytest.skip(str(RUNTIMES[runtime].obstacle(artifact)))


class TestEveryBackend:
    def test_every_row_of_a_mixed_batch_is_what_the_graph_says_of_it_alone(
        self, backend: Backend, artifact: Artifact, reference: Reference, random_pixels: MakePixels, tolerance: Any
    ):
        held = table(artifact, 3)
        backend.bind_table(held)
        for count in (1, 2, 3, 4, 5, 7, 8, 1):
            pixels = random_pixels(count, seed=count)
            chosen = np.arange(count, dtype=np.int32)[::-1] % 3
            chosen = np.ascontiguousarray(chosen)
            np.testing.assert_allclose(backend.run(pixels, chosen), reference(pixels, chosen, held), **tolerance)

    def test_repeated_runs_of_one_size_follow_their_input(
        self, backend: Backend, artifact: Artifact, reference: Reference, random_pixels: MakePixels, tolerance: Any
    ):
        held = table(artifact, 3)
        backend.bind_table(held)
        for seed in range(4):  # queued, captured, replayed twice
            pixels, chosen = random_pixels(2, seed=seed), slots(seed % 3, 2)
            np.testing.assert_allclose(backend.run(pixels, chosen), reference(pixels, chosen, held), **tolerance)

    def test_the_answer_is_the_callers(self, backend: Backend, artifact: Artifact, random_pixels: MakePixels):
        backend.bind_table(table(artifact, 2))
        first = backend.run(random_pixels(2, seed=1), slots(0, 1))
        kept = first.copy()
        backend.run(random_pixels(2, seed=2), slots(1, 0))
        np.testing.assert_array_equal(first, kept)
        assert (first.dtype, first.shape) == (np.float32, (2, 5))

    def test_a_batch_larger_than_an_engine_takes_at_once_is_answered_in_order(
        self, backend: Backend, artifact: Artifact, reference: Reference, random_pixels: MakePixels, tolerance: Any
    ):
        held = table(artifact, 3)
        backend.bind_table(held)
        pixels, chosen = random_pixels(19), np.arange(19, dtype=np.int32) % 3
        np.testing.assert_allclose(backend.run(pixels, chosen), reference(pixels, chosen, held), **tolerance)

    def test_a_rewritten_slot_is_seen_by_the_next_run_and_its_neighbours_stay(
        self, backend: Backend, artifact: Artifact, reference: Reference, random_pixels: MakePixels, tolerance: Any
    ):
        held = table(artifact, 3)
        backend.bind_table(held)
        pixels, chosen = random_pixels(3), slots(0, 1, 2)
        for _ in range(3):
            before = backend.run(pixels, chosen)
        held.write(1, prompt_set(artifact, 77))
        backend.refresh_slot(1)
        after = backend.run(pixels, chosen)
        np.testing.assert_allclose(after, reference(pixels, chosen, held), **tolerance)
        assert np.abs(after[1] - before[1]).max() > 0.1
        np.testing.assert_allclose(after[[0, 2]], before[[0, 2]], **tolerance)

    @pytest.mark.parametrize(("count", "prefix", "classes"), [(5, 3, 5), (3, 20, 5), (3, 3, 9), (8, 40, 12)])
    def test_a_larger_table_takes_the_place_of_the_one_before(
        self,
        backend: Backend,
        artifact: Artifact,
        reference: Reference,
        random_pixels: MakePixels,
        tolerance: Any,
        count: int,
        prefix: int,
        classes: int,
    ):
        backend.bind_table(table(artifact, 3))
        pixels = random_pixels(2)
        for _ in range(3):
            backend.run(pixels, slots(0, 2))
        held = table(artifact, count, prefix=prefix, classes=classes, seed=50)
        backend.bind_table(held)
        chosen = slots(count - 1, 0)
        for _ in range(3):
            np.testing.assert_allclose(backend.run(pixels, chosen), reference(pixels, chosen, held), **tolerance)

    def test_a_graph_without_a_table_takes_no_slots(
        self,
        folded_flowers: Path,
        open_runtime: Callable[[Artifact], Backend],
        random_pixels: MakePixels,
        tolerance: Any,
    ):
        folded = Artifact.open(folded_flowers)
        backend = open_runtime(folded)
        pixels = random_pixels(3)
        for _ in range(3):
            np.testing.assert_allclose(backend.run(pixels, None), Reference(folded)(pixels), **tolerance)
        with pytest.raises(InputError, match="takes no slots"):
            backend.run(pixels, slots(0, 0, 0))

    @pytest.mark.parametrize(
        ("shape", "dtype"), [((2, 31, 32, 3), "uint8"), ((2, 32, 32, 3), "float32"), ((0, 32, 32, 3), "uint8")]
    )
    def test_images_of_another_kind_are_refused(
        self, backend: Backend, artifact: Artifact, shape: tuple[int, ...], dtype: str
    ):
        backend.bind_table(table(artifact, 2))
        with pytest.raises(InputError, match=r"images should be uint8 \[B, 32, 32, 3\], found " + dtype):
            backend.run(np.zeros(shape, dtype), np.zeros(shape[0], np.int32))

    @pytest.mark.parametrize("chosen", [slots(0, 2), slots(-1, 0), slots(0), np.array([0, 1], np.int64), None], ids=str)
    def test_slots_that_do_not_exist_never_reach_the_device(
        self, backend: Backend, artifact: Artifact, random_pixels: MakePixels, chosen: Any
    ):
        backend.bind_table(table(artifact, 2))
        with pytest.raises(InputError, match="slots should be"):
            backend.run(random_pixels(2), chosen)
        assert backend.run(random_pixels(2), slots(0, 1)).shape == (2, 5)

    def test_a_run_before_a_table_is_bound_is_refused(self, backend: Backend, random_pixels: MakePixels):
        with pytest.raises(BackendError, match="no table is bound"):
            backend.run(random_pixels(1), slots(0))
        backend.refresh_slot(0)

    def test_threads_get_their_own_answers_while_slots_are_rewritten_and_the_table_grows(
        self, backend: Backend, artifact: Artifact, reference: Reference, random_pixels: MakePixels, tolerance: Any
    ):
        held = table(artifact, 3)
        backend.bind_table(held)
        batches = [(random_pixels(count, seed=count), np.arange(count, dtype=np.int32) % 2) for count in (1, 3, 6)]
        expected = [reference(pixels, chosen, held) for pixels, chosen in batches]
        done = threading.Event()
        failures: list[BaseException] = []

        def ask(number: int) -> None:
            pixels, chosen = batches[number]
            try:
                runs = 0
                while not done.is_set() or runs < 4:
                    runs += 1
                    found = backend.run(pixels, chosen)[:, :5]
                    np.testing.assert_allclose(found, expected[number], **tolerance)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(batches))]
        for thread in threads:
            thread.start()
        try:
            for step in range(6):
                held.write(2, prompt_set(artifact, 100 + step))
                backend.refresh_slot(2)
                held = held.resized({**held.sizes, "classes": 5 + step}, held.slots + 1)
                backend.bind_table(held)
        finally:
            done.set()
            for thread in threads:
                thread.join()
        assert failures == []

    def test_it_says_what_it_is(self, backend: Backend, runtime: str):
        described = backend.describe()
        assert described.name == backend.name == runtime.removeprefix("host ")
        assert described.version
        assert described.reason in ("asked for", "a test")
        assert backend.input_dtype == np.uint8

    def test_a_closed_backend_refuses_to_run_and_may_be_closed_again(
        self, backend: Backend, artifact: Artifact, random_pixels: MakePixels
    ):
        backend.bind_table(table(artifact, 2))
        backend.run(random_pixels(1), slots(0))
        backend.close()
        backend.close()
        with pytest.raises(BackendError, match="closed"):
            backend.run(random_pixels(1), slots(0))
        with pytest.raises(BackendError, match="closed"):
            backend.bind_table(table(artifact, 2))
