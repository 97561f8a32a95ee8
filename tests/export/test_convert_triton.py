"""The Triton model repository: its configuration as Triton's own message, its model in plain ONNX Runtime."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from vpdeploy import load
from vpdeploy.format.bundle import Bundle, withdraw_task
from vpdeploy_export.conversion import convert as convert_bundle
from vpdeploy_export.export import ExportReport
from vpdeploy_export.targets.target import TargetOptions

pytest.importorskip("grpc", reason="the message module of tritonclient needs it: tritonclient[grpc]")

MakePixels = Callable[..., np.ndarray]


def convert(zoo: Path, out: Path, **options: Any) -> Path:
    return convert_bundle(zoo, out, target="triton", options=TargetOptions(**options)).path


def parse_config(folder: Path) -> Any:
    """Read ``config.pbtxt`` as Triton does: as a ModelConfig message; unknown fields are errors."""
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    return text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def onnx_dims(value: onnx.ValueInfoProto) -> list[int | str]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


ONNX_TYPES = {"TYPE_UINT8": "UINT8", "TYPE_INT32": "INT32", "TYPE_FP32": "FLOAT"}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_configuration_is_tritons_and_says_what_the_model_says(
    zoo: Path, half_zoo: ExportReport, tmp_path: Path, precision: str
):
    folder = convert(zoo if precision == "fp32" else half_zoo.path, tmp_path / "repository")
    config = parse_config(folder)
    model = onnx.load(folder / "1" / config.default_model_filename)
    onnx.checker.check_model(model, full_check=True)
    assert config.name == folder.name
    assert config.backend == "onnxruntime"
    tensors = {value.name: value for value in [*model.graph.input, *model.graph.output]}
    declared = [*config.input, *config.output]
    assert [tensor.name for tensor in declared] == ["image", "slot", "logits"] == list(tensors)
    for tensor in declared:
        kind = type(tensor).DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number[tensor.data_type].name
        value = tensors[tensor.name]
        assert onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type) == ONNX_TYPES[kind]
        # Triton adds the batch; a reshape replaces what follows it.
        dims = list(tensor.reshape.shape) if tensor.HasField("reshape") else list(tensor.dims)
        assert ["batch", *dims] == onnx_dims(value)
        assert len(tensor.dims) > 0
        assert math.prod(dims) == math.prod(tensor.dims)


def test_batches_form_by_size_and_delay_on_the_device_asked_for(zoo: Path, tmp_path: Path):
    from tritonclient.grpc import model_config_pb2

    default = parse_config(convert(zoo, tmp_path / "a"))
    assert default.max_batch_size == 32
    assert list(default.dynamic_batching.preferred_batch_size) == [8, 16, 32]
    assert default.dynamic_batching.max_queue_delay_microseconds == 2000
    assert default.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_AUTO
    chosen = parse_config(convert(zoo, tmp_path / "b", name="eyes", max_batch=2, queue_delay_ms=0.5, device="gpu"))
    assert (chosen.name, chosen.max_batch_size) == ("eyes", 2)
    assert list(chosen.dynamic_batching.preferred_batch_size) == [1, 2]
    assert chosen.dynamic_batching.max_queue_delay_microseconds == 500
    assert chosen.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_GPU
    assert (tmp_path / "b" / "eyes" / "1" / "model.onnx").is_file()


def test_several_tasks_label_their_classes_by_slot_and_one_task_as_triton_does(zoo_copy: Path, tmp_path: Path):
    folder = convert(zoo_copy, tmp_path / "all")
    assert parse_config(folder).output[0].label_filename == ""
    tasks = json.loads((folder / "tasks.json").read_text())["tasks"]
    assert {task: (facts["slot"], facts["classes"]) for task, facts in tasks.items()} == {
        "flowers": (0, 4),
        "birds": (1, 7),
        "probe": (2, 2),
    }
    for task in ("flowers", "probe"):
        withdraw_task(zoo_copy, task)
    folder = convert(zoo_copy, tmp_path / "one")
    config = parse_config(folder)
    assert config.output[0].label_filename == "labels/birds.txt"
    labels = (folder / config.output[0].label_filename).read_text().splitlines()
    assert labels == [f"birds-{index}" for index in range(7)]
    assert list(config.output[0].dims) == [7]


def test_the_model_answers_mixed_slots_as_the_session_does(zoo: Path, tmp_path: Path, random_pixels: MakePixels):
    folder = convert(zoo, tmp_path / "repository")
    tasks = json.loads((folder / "tasks.json").read_text())["tasks"]
    config = parse_config(folder)
    model = onnxruntime.InferenceSession(folder / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    assert [node.name for node in model.get_inputs()] == ["image", "slot"]
    pixels = random_pixels(9)
    names = list(tasks)
    rows = [names[index % 3] for index in range(9)]
    requested = np.array([[tasks[row]["slot"]] for row in rows], np.int32)  # [B, 1], as a client sends it
    slots = requested.reshape([9, *config.input[1].reshape.shape])
    found = model.run(None, {"image": pixels, "slot": slots})[0]
    assert found.shape == (9, 7)
    with load(zoo, threads=1) as session:
        for image, row, logits in zip(pixels, rows, found, strict=True):
            with session.lease(row) as lease:
                expected = session.run(image[None], np.array([lease.slot], np.int32))[0]
            classes = len(Bundle.open(zoo).read_task(row).card.labels)
            np.testing.assert_allclose(logits[:classes], expected[:classes], rtol=0, atol=1e-4)
            assert logits.argmax() < classes


def test_other_models_of_a_repository_are_left_alone(zoo: Path, tmp_path: Path):
    other = tmp_path / "repository" / "other" / "1"
    other.mkdir(parents=True)
    (other / "model.onnx").write_text("another model")
    convert(zoo, tmp_path / "repository", name="eyes")
    convert(zoo, tmp_path / "repository", name="eyes")
    assert (other / "model.onnx").read_text() == "another model"
    assert sorted(path.name for path in (tmp_path / "repository").iterdir()) == ["eyes", "other"]


def test_names_of_models_are_those_of_folders(zoo: Path, tmp_path: Path):
    folder = convert(zoo, tmp_path / "repository")
    assert folder.name == zoo.name
    assert re.search(rf'^name: "{zoo.name}"$', (folder / "config.pbtxt").read_text(), re.MULTILINE)
