from __future__ import annotations

import json

from vpdeploy.backends.description import DeviceMemory, LoadedEngine, RuntimeDescription

MEMORY = DeviceMemory(weights=100, table=20, staging=3, contexts=7, pinned_host=3)
ENGINE = LoadedEngine(
    gpu="NVIDIA L4 (sm_89)",
    file="KEY.engine",
    batch_sizes=(1, 2, 4),
    contexts=2,
    cuda_graphs="3 captured",
    memory=MEMORY,
)


def description(**fields: object) -> RuntimeDescription:
    known = {"name": "tensorrt", "version": "10.12", "reason": "asked for", "threads": None}
    return RuntimeDescription(**{**known, **fields})  # type: ignore[arg-type]


def test_the_total_is_what_is_allocated_on_the_device():
    assert MEMORY.total == 100 + 20 + 3 + 7


def test_the_json_form_lists_the_runtime_and_then_its_engine():
    fields = description(engine=ENGINE).to_json()
    assert json.loads(json.dumps(fields)) == fields
    assert list(fields) == [
        *("runtime", "runtime_version", "reason", "threads", "gpu", "engine", "max_batch", "batch_sizes", "contexts"),
        *("cuda_graphs", "memory_bytes"),
    ]
    assert (fields["engine"], fields["max_batch"], fields["batch_sizes"]) == ("KEY.engine", 4, [1, 2, 4])
    assert fields["memory_bytes"] == {
        "weights": 100,
        "table": 20,
        "staging": 3,
        "contexts": 7,
        "total": 130,
        "pinned_host": 3,
    }


def test_what_there_is_not_is_left_out_of_the_json_form():
    assert description(threads=2).to_json() == {
        "runtime": "tensorrt",
        "runtime_version": "10.12",
        "reason": "asked for",
        "threads": 2,
    }
    assert description(note="slow").to_json()["note"] == "slow"
