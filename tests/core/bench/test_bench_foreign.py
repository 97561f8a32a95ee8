from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vpdeploy.bench.benchmark import Choice, open_subject
from vpdeploy.bench.foreign import ForeignSubject
from vpdeploy.bench.subject import Cell
from vpdeploy.errors import BackendError, BundleError, SpecError, VpdeployError

onnx = pytest.importorskip("onnx", reason="needs the export extra")

FLOAT, UINT8, FLOAT16 = 1, 2, 10  # TensorProto.DataType


def write_model(
    path: Path,
    *shapes: Sequence[int | str],
    element: int = FLOAT,
    weights: np.ndarray | None = None,
    opset: int = 18,
    external: bool = False,
) -> Path:
    """A model that reduces each of its inputs to one number for each image, and adds them."""
    helper = onnx.helper
    shapes = shapes or (("batch", 3, 8, 8),)
    inputs = [helper.make_tensor_value_info(f"x{index}", element, shape) for index, shape in enumerate(shapes)]
    nodes, sums = [], []
    for index, each in enumerate(inputs):
        nodes.append(helper.make_node("Cast", [each.name], [f"float{index}"], to=FLOAT))
        nodes.append(helper.make_node("ReduceMean", [f"float{index}"], [f"sum{index}"], keepdims=0))
        sums.append(f"sum{index}")
    weights = np.ones(5, np.float32) if weights is None else weights
    nodes.append(helper.make_node("Cast", ["w"], ["wide"], to=FLOAT))
    nodes.append(helper.make_node("Sum", [*sums, "wide"], ["y"]))
    graph = helper.make_graph(
        nodes,
        "g",
        inputs,
        [helper.make_tensor_value_info("y", FLOAT, None)],
        [onnx.numpy_helper.from_array(weights, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    onnx.save(model, path, save_as_external_data=external, location=f"{path.name}.data", size_threshold=0)
    return path


def load(path: Path, **options: Any) -> ForeignSubject:
    return ForeignSubject(path, **{"name": path.name, "runtime": "auto", "threads": 1, **options})


def test_a_plain_float_model_is_measured(tmp_path: Path):
    subject = load(write_model(tmp_path / "plain.onnx"))
    assert (subject.tasks, subject.fixed_batch) == (1, None)
    assert subject.prepare(Cell(batch=3, mix="one"), 0)() is None
    facts = subject.facts()
    assert (facts.kind, facts.opset, facts.precision, facts.input) == ("ONNX file", 18, "fp32", "float32")
    assert (facts.image_size, facts.runtime.threads) == ((8, 8), 1)
    assert facts.graph_bytes == (tmp_path / "plain.onnx").stat().st_size


@pytest.mark.parametrize(
    ("shape", "element", "dtype", "size"),
    [
        (("b", 3, 8, 8), FLOAT16, "float16", 8),
        (("b", 3, 8, 8), UINT8, "uint8", 8),
        (("b", 8, 8, 3), UINT8, "uint8", 8),
        (("b", 3, 8, 12), FLOAT, "float32", [8, 12]),
    ],
)
def test_images_take_the_form_of_the_input(
    tmp_path: Path, shape: tuple[int | str, ...], element: int, dtype: str, size: int | list[int]
):
    subject = load(write_model(tmp_path / "x.onnx", shape, element=element))
    subject.prepare(Cell(batch=2, mix="one"), 0)()
    assert (subject.facts().input, subject.facts().to_json()["image_size"]) == (dtype, size)


def test_the_precision_is_that_of_most_weights(tmp_path: Path):
    assert load(write_model(tmp_path / "x.onnx", weights=np.ones(9, np.float16))).facts().precision == "fp16"


def test_a_fixed_batch_is_known(tmp_path: Path):
    assert load(write_model(tmp_path / "x.onnx", (4, 3, 8, 8))).fixed_batch == 4


def test_weights_beside_the_file_count(tmp_path: Path):
    path = write_model(tmp_path / "x.onnx", weights=np.ones(1000, np.float32), external=True)
    assert load(path).facts().graph_bytes == path.stat().st_size + 4000


@pytest.mark.parametrize(
    ("shapes", "element", "message"),
    [
        ([("b", 3, 8, 8), ("b", 3, 8, 8)], FLOAT, "has 2 inputs .x0, x1., bench makes images only"),
        ([("b", 3, "h", "w")], FLOAT, "expected one image input of fixed size"),
        ([("b", 192)], FLOAT, "expected one image input of fixed size"),
        ([("b", 4, 8, 8)], FLOAT, "expected one image input of fixed size"),
        ([("b", 3, 8, 8)], 7, "input 'x0' is tensor.int64."),
    ],
)
def test_inputs_that_are_no_images_are_refused(
    tmp_path: Path, shapes: list[tuple[int | str, ...]], element: int, message: str
):
    with pytest.raises(SpecError, match=message):
        load(write_model(tmp_path / "x.onnx", *shapes, element=element))


def test_a_runtime_for_exports_of_ours_is_refused(tmp_path: Path):
    with pytest.raises(SpecError, match="runtime 'tensorrt' cannot run it; choose onnxruntime-cpu"):
        load(write_model(tmp_path / "x.onnx"), runtime="tensorrt")


def test_a_provider_that_does_not_work_here_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("vpdeploy.bench.foreign.gpu_obstacle", lambda: "no NVIDIA driver")
    with pytest.raises(BackendError, match="runtime 'onnxruntime-cuda' does not work here: "):
        load(write_model(tmp_path / "x.onnx"), runtime="onnxruntime-cuda")


def test_a_file_that_onnx_runtime_cannot_load_is_one_line(tmp_path: Path):
    path = write_model(tmp_path / "x.onnx", opset=999)
    with pytest.raises(BackendError, match="ONNX Runtime cannot load it: ") as caught:
        load(path)
    assert "\n" not in str(caught.value)


def open_path(path: Path, **options: Any) -> Any:
    return open_subject(Choice(path=path, **options), name=path.name, threads=1, tasks=None)


def test_a_file_without_our_metadata_is_foreign(tmp_path: Path):
    assert isinstance(open_path(write_model(tmp_path / "x.onnx")), ForeignSubject)


def test_the_graph_inside_a_bundle_names_the_folder(zoo: Path):
    with pytest.raises(SpecError, match="give the bundle's folder"):
        open_path(zoo / "model.onnx")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.onnx", None, "does not exist; expected a bundle folder, an .onnx file or a file engines/KEY.engine"),
        ("x.txt", b"text", "is none of these"),
        ("x.onnx", b"text that is no protobuf", "not an ONNX file, or truncated"),
    ],
)
def test_what_cannot_be_measured_is_refused(tmp_path: Path, name: str, content: bytes | None, message: str):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BundleError, match=message):
        open_path(tmp_path / name)


def test_a_truncated_file_is_refused(tmp_path: Path):
    path = write_model(tmp_path / "x.onnx", weights=np.ones(1000, np.float32))
    path.write_bytes(path.read_bytes()[:-600])
    with pytest.raises(VpdeployError, match="not an ONNX file, or truncated"):
        open_path(path)
