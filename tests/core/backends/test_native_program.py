from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from core.backends.native_host import open_host
from core.backends.tables import CLOSE, MakePixels, Reference, prompt_set, slots, table

from vpdeploy.engines.profile import AxisRange
from vpdeploy.format.artifact import Artifact

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
