from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from core.backends.fake_tensorrt import ACTIVATION_BYTES, Knobs
from core.backends.host_device import HostDevice
from core.backends.native_host import open_host
from core.backends.tables import CLOSE, MakePixels, Reference, slots, table

from vpdeploy.errors import BackendError
from vpdeploy.format.artifact import Artifact

# --- several contexts ---


def test_two_batches_are_under_way_at_once(artifact: Artifact, tmp_path: Path, random_pixels: MakePixels):
    native = open_host(artifact, tmp_path, lanes=2)
    native.backend.bind_table(table(artifact, 2))
    together = threading.Barrier(2, timeout=20)
    native.knobs.on_execute = lambda: together.wait() and None
    failures: list[BaseException] = []

    def ask() -> None:
        try:
            native.backend.run(random_pixels(1), slots(0))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []  # one context alone would have broken the barrier


def test_the_old_table_stays_until_the_last_run_that_reads_it_has_ended(
    artifact: Artifact, tmp_path: Path, random_pixels: MakePixels, reference: Reference
):
    native = open_host(artifact, tmp_path, lanes=2)
    old, new = table(artifact, 2), table(artifact, 4)
    native.backend.bind_table(old)
    pixels = random_pixels(1)
    expected = reference(pixels, slots(1), old)
    inside, proceed = threading.Event(), threading.Event()
    answers: list[Any] = []

    def hold() -> None:
        if threading.current_thread() is asking:
            inside.set()
            assert proceed.wait(20)

    asking = threading.Thread(target=lambda: answers.append(native.backend.run(pixels, slots(1))))
    native.device.on_synchronize = hold
    asking.start()
    assert inside.wait(20)
    binding = threading.Thread(target=lambda: native.backend.bind_table(new))
    native.device.calls["free"] = 0
    binding.start()
    assert native.device.calls["free"] == 0  # it waits for the run that is under way
    proceed.set()
    binding.join()
    asking.join()
    np.testing.assert_allclose(answers[0], expected, **CLOSE)
    assert native.device.calls["free"] >= 1


# --- memory ---


def test_memory_is_accounted_for_to_the_byte(artifact: Artifact, tmp_path: Path, random_pixels: MakePixels):
    native = open_host(artifact, tmp_path, lanes=2)
    held = table(artifact, 3)
    native.backend.bind_table(held)
    native.backend.run(random_pixels(2), slots(0, 1))
    memory = native.backend.describe().engine.memory
    assert memory.contexts == 2 * ACTIVATION_BYTES
    assert held.size_bytes <= memory.table < held.size_bytes + 256 * len(held.arrays)
    assert memory.table + memory.staging + memory.contexts == native.device.allocated
    assert memory.total == native.device.allocated + memory.weights


def test_a_table_that_does_not_fit_leaves_the_old_one_bound(
    artifact: Artifact, tmp_path: Path, random_pixels: MakePixels, reference: Reference
):
    native = open_host(artifact, tmp_path, lanes=1)
    held = table(artifact, 2)
    native.backend.bind_table(held)
    pixels = random_pixels(1)
    native.backend.run(pixels, slots(1))
    native.device.total = native.device.allocated + 100
    with pytest.raises(
        BackendError, match=r"out of GPU memory: a table of 40 slots needs \d+ bytes, 100 are free; choose"
    ):
        native.backend.bind_table(table(artifact, 40))
    np.testing.assert_allclose(native.backend.run(pixels, slots(1)), reference(pixels, slots(1), held), **CLOSE)


def test_a_lane_that_cannot_change_over_goes_on_with_the_old_table(
    artifact: Artifact, tmp_path: Path, random_pixels: MakePixels, reference: Reference
):
    native = open_host(artifact, tmp_path, lanes=1)
    held = table(artifact, 2)
    native.backend.bind_table(held)
    pixels, chosen = random_pixels(2), slots(1, 0)
    for _ in range(2):
        native.backend.run(pixels, chosen)
    native.device.fail_calls = {"destroy_graph"}
    with pytest.raises(BackendError, match="destroy_graph failed"):
        native.backend.bind_table(table(artifact, 3, seed=40))
    native.device.fail_calls = set()
    for _ in range(3):
        np.testing.assert_allclose(native.backend.run(pixels, chosen), reference(pixels, chosen, held), **CLOSE)


def test_a_table_beyond_the_engines_profile_is_refused_with_the_command_that_helps(
    artifact: Artifact, tmp_path: Path, random_pixels: MakePixels
):
    native = open_host(artifact, tmp_path, lanes=1)
    native.backend.bind_table(table(artifact, 2))
    with pytest.raises(BackendError, match=r"prefix 80 is outside 1:16:64.*vpdeploy build .* --runtime tensorrt"):
        native.backend.bind_table(table(artifact, 2, prefix=80))
    assert native.backend.run(random_pixels(1), slots(0)).shape == (1, 5)


# --- failures ---


def scenario(artifact: Artifact, folder: Path, device: HostDevice, random_pixels: MakePixels, runtime: str) -> None:
    native = open_host(artifact, folder, device=device, lanes=2, runtime=runtime)
    try:
        held = table(artifact, 2)
        native.backend.bind_table(held)
        for _ in range(3):
            native.backend.run(random_pixels(1), slots(0))
        native.backend.refresh_slot(1)
        native.backend.bind_table(table(artifact, 3, classes=7))
        for _ in range(2):
            native.backend.run(random_pixels(3), slots(0, 1, 2))
    finally:
        device.fail_at = None
        native.backend.close()


@pytest.mark.parametrize("runtime", ["tensorrt", "tensorrt-rtx"])
def test_a_failure_of_any_call_is_one_error_and_leaks_nothing(
    artifact: Artifact, tmp_path: Path, random_pixels: MakePixels, runtime: str
):
    device = HostDevice()
    scenario(artifact, tmp_path, device, random_pixels, runtime)
    assert device.alive == 0
    refused = 0
    for number in range(device.numbered_calls - 1):
        failing = HostDevice()
        failing.fail_at = number
        try:
            scenario(artifact, tmp_path, failing, random_pixels, runtime)
        except BackendError as error:
            refused += 1
            assert "failed" in str(error)  # noqa: PT017
        assert failing.alive == 0, f"call {number} leaks"
    assert refused >= device.numbered_calls - 15  # some only keep a graph from being captured, or fall into close


def test_an_illegal_address_says_that_the_process_has_to_be_restarted(
    artifact: Artifact, tmp_path: Path, random_pixels: MakePixels
):
    native = open_host(artifact, tmp_path, lanes=1)
    native.backend.bind_table(table(artifact, 2))
    native.device.fail_calls = {"synchronize"}
    with pytest.raises(BackendError, match=r"^synchronize failed with cudaErrorLaunchFailure .*restart the process"):
        native.backend.run(random_pixels(1), slots(0))
    native.device.fail_calls = set()


def test_a_runtime_that_refuses_a_run_is_quoted(artifact: Artifact, tmp_path: Path, random_pixels: MakePixels):
    native = open_host(artifact, tmp_path, lanes=1)
    native.backend.bind_table(table(artifact, 2))
    native.knobs.refuse_runs = True
    with pytest.raises(BackendError, match="TensorRT refuses a run: enqueueV3 was refused"):
        native.backend.run(random_pixels(1), slots(0))
    native.knobs.refuse_runs = False
    assert native.backend.run(random_pixels(1), slots(0)).shape == (1, 5)


def test_no_room_for_a_second_context_is_an_error_and_frees_the_first(artifact: Artifact, tmp_path: Path):
    device, knobs = HostDevice(), Knobs()
    knobs.refuse_contexts_after = 1
    with pytest.raises(BackendError, match="no execution context: out of memory"):
        open_host(artifact, tmp_path, device=device, knobs=knobs)
    assert device.alive == 0
