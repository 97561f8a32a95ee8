from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from core.backends.fake_tensorrt import ACTIVATION_BYTES, Diagnostics, Knobs, Validity
from core.backends.host_device import HostDevice
from core.backends.native_host import open_host
from core.backends.tables import Pixels, Reference, prompt_set, table

from vpdeploy.artifact import Artifact
from vpdeploy.engines.plan import EngineOptions
from vpdeploy.engines.profile import AxisRange
from vpdeploy.errors import BackendError, EngineIncompatibleError
from vpdeploy.layout import Layout

MakePixels = Callable[..., Pixels]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def slots(*numbers: int) -> Any:
    return np.array(numbers, np.int32)


# --- CUDA graphs ---


def test_a_graph_is_captured_on_the_second_run_of_a_size_and_replayed_from_then_on(
    artifact: Artifact, tmp_path: Path, random_pixels: MakePixels
):
    native = open_host(artifact, tmp_path, lanes=1)
    native.backend.bind_table(table(artifact, 2))
    seen = []
    for _ in range(4):
        native.backend.run(random_pixels(2), slots(0, 1))
        seen.append((native.device.calls["begin_capture"], native.device.calls["launch"]))
    assert seen == [(0, 0), (1, 1), (1, 2), (1, 3)]
    assert native.backend.describe().engine.cuda_graphs == "1 captured"


def test_each_batch_size_has_its_own_graph_and_its_own_context(
    artifact: Artifact, tmp_path: Path, random_pixels: MakePixels
):
    native = open_host(artifact, tmp_path, lanes=1)
    native.backend.bind_table(table(artifact, 2))
    for count in (8, 8, 2, 2, 3, 3, 5, 6, 7):  # 5 and 7 run as 6 and 8
        native.backend.run(random_pixels(count), np.zeros(count, np.int32))
    assert native.device.graphs == 4
    assert len(native.knobs.contexts) == 4


def test_a_slot_update_copies_one_slots_bytes_and_keeps_the_graphs(
    artifact: Artifact, tmp_path: Path, random_pixels: MakePixels, reference: Reference
):
    native = open_host(artifact, tmp_path, lanes=1)
    held = table(artifact, 5)
    native.backend.bind_table(held)
    pixels, chosen = random_pixels(2), slots(4, 3)
    for _ in range(2):
        native.backend.run(pixels, chosen)
    held.write(3, prompt_set(artifact, 90))
    copied = native.device.copied_in
    native.backend.refresh_slot(3)
    assert native.device.copied_in - copied == held.slot_bytes
    np.testing.assert_allclose(native.backend.run(pixels, chosen), reference(pixels, chosen, held), **CLOSE)
    assert (native.device.calls["begin_capture"], native.device.calls["launch"]) == (1, 2)


def test_another_table_has_graphs_captured_again_and_frees_the_old_one(
    artifact: Artifact, tmp_path: Path, random_pixels: MakePixels, reference: Reference
):
    native = open_host(artifact, tmp_path, lanes=1)
    for count in (2, 3, 4):
        held = table(artifact, count)
        native.backend.bind_table(held)
        assert native.device.graphs == 0
        pixels, chosen = random_pixels(2), slots(count - 1, 0)
        for _ in range(3):
            np.testing.assert_allclose(native.backend.run(pixels, chosen), reference(pixels, chosen, held), **CLOSE)
    memory = native.backend.describe().engine.memory
    assert native.device.allocated == memory.table + memory.staging + memory.contexts
    assert native.device.calls["begin_capture"] == 3


def test_tensorrt_rtx_captures_its_own_graphs_in_one_context_for_each_lane(
    artifact: Artifact, tmp_path: Path, random_pixels: MakePixels
):
    native = open_host(artifact, tmp_path, runtime="tensorrt-rtx", lanes=1)
    native.backend.bind_table(table(artifact, 2))
    for count in (1, 1, 2, 2, 2):
        native.backend.run(random_pixels(count), np.zeros(count, np.int32))
    assert native.device.calls["begin_capture"] == 0
    assert len(native.knobs.contexts) == 1
    assert native.backend.describe().engine.cuda_graphs == "the runtime's own"


@pytest.mark.parametrize("call", ["end_capture", "execute"])
def test_a_run_that_cannot_be_captured_is_queued_call_by_call_and_this_is_said(
    artifact: Artifact, tmp_path: Path, random_pixels: MakePixels, reference: Reference, call: str
):
    native = open_host(artifact, tmp_path, lanes=1)
    held = table(artifact, 2)
    native.backend.bind_table(held)
    pixels, chosen = random_pixels(2), slots(0, 1)
    native.backend.run(pixels, chosen)
    if call == "end_capture":
        native.device.fail_calls = {"end_capture"}
    else:
        native.knobs.on_execute = lambda: setattr(
            native.knobs, "refuse_runs", native.device.calls["end_capture"] < native.device.calls["begin_capture"]
        )
    for _ in range(3):
        np.testing.assert_allclose(native.backend.run(pixels, chosen), reference(pixels, chosen, held), **CLOSE)
    loaded = native.backend.describe().engine
    assert loaded is not None
    assert loaded.cuda_graphs == "0 captured"
    assert len(loaded.cuda_graphs_refused) == 1
    assert loaded.to_json()["cuda_graphs_refused"] == list(loaded.cuda_graphs_refused)
    assert native.device.calls["begin_capture"] == 1
    native.device.fail_calls = set()
    native.backend.close()
    assert native.device.alive == 0


# --- batch sizes ---


def test_a_batch_below_the_smallest_is_padded_and_one_above_the_largest_is_split(
    artifact: Artifact, tmp_path: Path, random_pixels: MakePixels, reference: Reference
):
    native = open_host(artifact, tmp_path, batch=AxisRange(2, 4, 5), lanes=1)
    held = table(artifact, 2)
    native.backend.bind_table(held)
    assert native.backend.describe().engine.batch_sizes == (2, 3, 4, 5)
    assert native.backend.describe().engine.max_batch == 5
    for count in (1, 11):
        pixels, chosen = random_pixels(count), np.arange(count, dtype=np.int32) % 2
        np.testing.assert_allclose(native.backend.run(pixels, chosen), reference(pixels, chosen, held), **CLOSE)


def test_staging_grows_to_the_largest_batch_seen_and_no_further(
    artifact: Artifact, tmp_path: Path, random_pixels: MakePixels
):
    native = open_host(artifact, tmp_path, batch=AxisRange(1, 4, 8), lanes=1)
    native.backend.bind_table(table(artifact, 2))

    def staging() -> int:
        return int(native.backend.describe().engine.memory.staging)

    sizes = []
    for count in (1, 2, 8, 3, 20):
        native.backend.run(random_pixels(count), np.zeros(count, np.int32))
        sizes.append(staging())
    image, alignment = 32 * 32 * 3, 256
    for capacity, found in zip((1, 2, 8, 8, 8), sizes, strict=True):
        parts = (capacity * image, capacity * 4, capacity * 4 * 5)
        assert found == sum(-(-part // alignment) * alignment for part in parts)


def test_a_graph_that_was_captured_before_staging_grew_is_captured_again(
    artifact: Artifact, tmp_path: Path, random_pixels: MakePixels, reference: Reference
):
    native = open_host(artifact, tmp_path, lanes=1)
    held = table(artifact, 2)
    native.backend.bind_table(held)
    for count in (1, 1, 1, 8, 1, 1, 1):
        pixels, chosen = random_pixels(count, seed=count), np.arange(count, dtype=np.int32)[::-1] % 2
        chosen = np.ascontiguousarray(chosen)
        np.testing.assert_allclose(native.backend.run(pixels, chosen), reference(pixels, chosen, held), **CLOSE)
    assert native.device.calls["begin_capture"] == 2
    memory = native.backend.describe().engine.memory
    assert native.device.allocated == memory.table + memory.staging + memory.contexts


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


# --- engines ---


def test_an_engine_that_the_runtime_calls_invalid_is_refused_with_its_reasons(artifact: Artifact, tmp_path: Path):
    knobs = Knobs()
    knobs.validity = (Validity.INVALID, Diagnostics.VERSION_MISMATCH | Diagnostics.UNSUPPORTED_CC)
    with pytest.raises(
        EngineIncompatibleError,
        match=r"TensorRT-RTX 1.7.1.116 refuses it \(version_mismatch, unsupported_cc\).*run: vpdeploy",
    ):
        open_host(artifact, tmp_path, runtime="tensorrt-rtx", knobs=knobs)


def test_an_engine_that_cannot_be_deserialised_is_refused_with_tensorrts_words(artifact: Artifact, tmp_path: Path):
    knobs = Knobs()
    knobs.corrupt = True
    with pytest.raises(EngineIncompatibleError, match=r"Serialization assertion failed.*vpdeploy build .* --force"):
        open_host(artifact, tmp_path, knobs=knobs)


def test_an_engine_of_another_layout_is_refused_by_name(artifact: Artifact, tmp_path: Path):
    assert artifact.layout is not None
    tensors = [
        replace(spec, dtype="float16") if spec.name == "prefix_key" else spec for spec in artifact.layout.tensors
    ]
    other = replace(artifact, layout=Layout(tensors=tuple(tensors)))
    with pytest.raises(EngineIncompatibleError, match=r"'prefix_key' should be float16 .*, found float32"):
        open_host(other, tmp_path)


def test_a_stripped_engine_takes_its_weights_from_the_graph(
    artifact: Artifact, tmp_path: Path, random_pixels: MakePixels
):
    native = open_host(artifact, tmp_path, options=EngineOptions(weight_stripped=True))
    assert native.knobs.refitted == [str(artifact.graph_path)]


def test_host_code_is_allowed_for_version_compatible_engines_alone(artifact: Artifact, tmp_path: Path):
    knobs = Knobs()
    knobs.holds_host_code = True
    open_host(artifact, tmp_path, knobs=knobs, options=EngineOptions(version_compatible=True)).backend.close()
    with pytest.raises(EngineIncompatibleError, match="host code, which is not allowed"):
        open_host(artifact, tmp_path, knobs=knobs)


# --- the runtime cache of TensorRT-RTX ---


def test_what_was_compiled_is_kept_beside_the_engine_for_the_next_start(artifact: Artifact, tmp_path: Path):
    first = open_host(artifact, tmp_path, runtime="tensorrt-rtx")
    assert first.backend.describe().engine.runtime_cache.startswith("empty")
    first.backend.close()
    (path,) = tmp_path.glob("*.runtime-cache")
    assert path.name.endswith(".host-gpu-cuda13.0.runtime-cache")
    assert path.read_bytes() == b"compiled kernels"
    second = open_host(artifact, tmp_path, runtime="tensorrt-rtx")
    assert second.backend.describe().engine.runtime_cache == f"{path.name}, 16 bytes"
    second.backend.close()


def test_a_damaged_runtime_cache_is_ignored_with_a_note_and_written_anew(artifact: Artifact, tmp_path: Path):
    open_host(artifact, tmp_path, runtime="tensorrt-rtx").backend.close()
    (path,) = tmp_path.glob("*.runtime-cache")
    path.write_bytes(b"torn")
    native = open_host(artifact, tmp_path, runtime="tensorrt-rtx")
    assert "is damaged or of another driver and is ignored" in native.backend.describe().engine.runtime_cache
    native.backend.close()
    assert path.read_bytes() == b"compiled kernels"


def test_a_runtime_cache_that_cannot_be_written_is_a_warning_and_closing_goes_on(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    native = open_host(artifact, tmp_path, runtime="tensorrt-rtx")
    monkeypatch.setattr("vpdeploy.backends.native.runtime_cache.write_atomically", refuse)
    native.backend.close()
    assert "cannot be written (Permission denied); the next start compiles again" in caplog.text
    assert native.device.alive == 0


def test_tensorrt_keeps_no_runtime_cache(artifact: Artifact, tmp_path: Path):
    open_host(artifact, tmp_path).backend.close()
    assert list(tmp_path.glob("*.runtime-cache")) == []
