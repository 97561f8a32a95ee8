"""Adapters, used as a user of plain ONNX Runtime uses them: in a process that has no vpdeploy."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny_runs
from exports import export_bundle

from vpdeploy import load
from vpdeploy.format.bundle import Bundle
from vpdeploy.format.graphfacts import Precision
from vpdeploy_export.conversion import convert as convert_bundle
from vpdeploy_export.export import ExportReport
from vpdeploy_export.targets.target import TargetOptions

MakePixels = Callable[..., np.ndarray]

PLAIN = """
import json, sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"vpdeploy", "vpdeploy_train", "vpdeploy_export", "onnx", "onnx_ir", "torch"}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Hidden())
import numpy as np
import onnxruntime as ort

folder, tasks = sys.argv[1], sys.argv[2:]
image = np.load(folder + "/image.npy")
settings = ort.SessionOptions()
settings.intra_op_num_threads = 1
settings.log_severity_level = 3
session = ort.InferenceSession(folder + "/out/model.onnx", settings, providers=["CPUExecutionProvider"])
answers = {"": session.run(["logits"], {"image": image})[0]}
for task in tasks:
    adapter = ort.LoraAdapter()
    adapter.Load(f"{folder}/out/{task}.onnx_adapter")
    options = ort.RunOptions()
    options.add_active_adapter(adapter)
    answers[task] = session.run(["logits"], {"image": image}, options)[0]
answers["again"] = session.run(["logits"], {"image": image[:1]})[0]
np.savez(folder + "/answers.npz", **answers)
print(json.dumps([node.name for node in session.get_inputs()]))
"""


def convert(zoo: Path, out: Path) -> Path:
    return convert_bundle(zoo, out, target="onnx-adapter", options=TargetOptions()).path


def bundle_answers(zoo: Path, pixels: np.ndarray) -> dict[str, np.ndarray]:
    """What vpdeploy's session answers, by task, without padded classes."""
    answers = {}
    with load(zoo, threads=1) as session:
        for task in session.tasks:
            with session.lease(task) as lease:
                logits = session.run(pixels, np.full(len(pixels), lease.slot, np.int32))
                answers[task] = logits[:, : len(lease.card.labels)]
    return answers


@pytest.fixture(scope="module")
def superset_zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """E²VPT, VAPT and a linear head in one superset layout."""
    folder = tmp_path_factory.mktemp("superset")
    return export_bundle(tiny_runs.write_mixed_runs(folder), folder / "zoo").path


@pytest.mark.parametrize(
    ("kind", "precision"), [("prefix", "fp32"), ("prefix", "fp16"), ("superset", "fp32")], ids=lambda value: str(value)
)
def test_plain_onnx_runtime_answers_as_the_session_for_every_task(
    zoo: Path,
    half_zoo: ExportReport,
    superset_zoo: Path,
    tmp_path: Path,
    random_pixels: MakePixels,
    kind: str,
    precision: Precision,
):
    source = superset_zoo if kind == "superset" else zoo if precision == "fp32" else half_zoo.path
    assert (Bundle.open(source).manifest.layout.family, Bundle.open(source).manifest.graph.precision) == (
        kind,
        precision,
    )
    pixels = random_pixels(5, seed=7)
    expected = bundle_answers(source, pixels)
    convert(source, tmp_path / "out")
    np.save(tmp_path / "image.npy", pixels)
    finished = subprocess.run(
        [sys.executable, "-c", PLAIN, str(tmp_path), *expected], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    assert "slot" not in json.loads(finished.stdout)
    found = np.load(tmp_path / "answers.npz")
    first = next(iter(expected))
    tolerance = 1e-4 if precision == "fp32" else 1e-2
    for task, logits in expected.items():
        assert found[task].shape == logits.shape  # this task's classes, none padded
        assert np.abs(found[task] - logits).max() <= tolerance * max(1.0, np.abs(logits).max())
    np.testing.assert_allclose(found[""], found[first], atol=1e-3)  # without an adapter: the first task
    np.testing.assert_allclose(found["again"], found[""][:1], atol=1e-3)  # an adapter leaves nothing behind
    gaps = [np.abs(found[task][:, :2] - found[first][:, :2]).max() for task in list(expected)[1:]]
    assert min(gaps) > 0.05


def test_an_adapter_has_its_own_tasks_lengths(zoo: Path, tmp_path: Path):
    folder = convert(zoo, tmp_path / "out")
    card = json.loads((folder / "tasks.json").read_text())["tasks"]
    bundle = Bundle.open(zoo)
    lengths = set()
    for task in bundle.tasks:
        adapter = onnxruntime.AdapterFormat.read_adapter(str(folder / f"{task}.onnx_adapter"))
        found = {name: tuple(value.shape()) for name, value in adapter.get_parameters().items()}
        prompts = bundle.read_task(task).tensors
        # A task without prompts has one column, which nothing attends to: a tensor of length 0 cannot be stored.
        assert found == {name: (1, *(max(1, size) for size in array.shape)) for name, array in prompts.items()}
        assert card[task]["shapes"] == {name: list(shape) for name, shape in found.items()}
        lengths.add((found["prefix_key"][3], found["head_bias"][1]))
    assert len(lengths) == 3
    probe = onnxruntime.AdapterFormat.read_adapter(str(folder / "probe.onnx_adapter")).get_parameters()
    assert (probe["prefix_bias"].numpy() == -30000).all()


def test_the_graph_keeps_its_named_sizes_and_passes_the_checker(zoo: Path, superset_zoo: Path, tmp_path: Path):
    for number, source in enumerate((zoo, superset_zoo)):
        folder = convert(source, tmp_path / str(number))
        onnx.checker.check_model(str(folder / "model.onnx"), full_check=True)
        model = onnx.load(folder / "model.onnx")
        assert model.ir_version >= 4
        inputs = {
            value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
            for value in model.graph.input
        }
        layout = Bundle.open(source).manifest.layout
        assert list(inputs) == ["image", *(spec.name for spec in layout.tensors)]
        assert inputs["image"] == ["batch", 32, 32, 3]
        for spec in layout.tensors:
            assert inputs[spec.name] == [1, *spec.shape]
        assert {spec.name for spec in layout.tensors} <= {tensor.name for tensor in model.graph.initializer}


def test_the_readmes_code_runs_as_it_is(zoo: Path, tmp_path: Path):
    folder = convert(zoo, tmp_path / "out")
    text = (folder / "README.txt").read_text()
    code = "\n".join(line[4:] for line in text.splitlines() if line.startswith("    "))
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False, timeout=120
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.strip() in {"probe-0", "probe-1"}
    assert all(len(line) <= 120 for line in text.splitlines())
