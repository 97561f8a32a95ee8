from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from exports import export_bundle, export_folded

from vpdeploy import load
from vpdeploy.errors import BundleCorruptError, BundleError
from vpdeploy.files import sha256_of_file
from vpdeploy.format.artifact import Artifact
from vpdeploy.format.bundle import Bundle, publish_task
from vpdeploy.format.datafile import data_file_of, graph_size_bytes, move_graph
from vpdeploy.format.folded import FoldedCard
from vpdeploy.format.graphfacts import GraphFacts
from vpdeploy.format.onnxfile import append_metadata
from vpdeploy.format.preprocessing import Preprocessing
from vpdeploy.format.task import BackboneId, TaskCard
from vpdeploy_export import export
from vpdeploy_export.forms import folded
from vpdeploy_export.onnx import save
from vpdeploy_export.onnx.save import save_model, staging_folder

MakePixels = Callable[..., np.ndarray]
Traced = Callable[..., None]


def names(folder: Path) -> list[str]:
    return sorted(child.name for child in folder.iterdir() if child.name not in (".lock", ".holds"))


def the_data(folder: Path) -> Path:
    (path,) = folder.glob("*.data")
    return path


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """One file holds 10 kB, so that the tiny graphs need a data file."""
    monkeypatch.setattr(save, "MAX_FILE_BYTES", 10_000)


@pytest.fixture
def split_flowers(small_limit: None, traced: Traced, tiny_run_paths: dict[str, Path], tmp_path: Path) -> Path:
    """A folded model of two files."""
    return export_folded(tiny_run_paths["flowers"], tmp_path / "one" / "flowers.onnx").path


@pytest.fixture
def split_zoo(small_limit: None, traced: Traced, tiny_run_paths: dict[str, Path], tmp_path: Path) -> Path:
    """A bundle whose graph is two files."""
    return export_bundle(list(tiny_run_paths.values()), tmp_path / "split" / "zoo").path


def logits(path: Path, pixels: np.ndarray) -> np.ndarray:
    with load(path, threads=1) as session:
        slots = np.arange(len(pixels), dtype=np.int32) % len(session.tasks)
        return np.asarray(session.run(pixels, slots))


def other_weights(model: onnx.ModelProto) -> None:
    """Change a weight by less than the parity gate sees."""
    weights = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    values = onnx.numpy_helper.to_array(weights)
    weights.CopyFrom(onnx.numpy_helper.from_array(values * np.float32(1 + 1e-6), weights.name))


# --- writing ---


def test_weights_up_to_the_limit_are_one_file(folded_flowers: Path, tmp_path: Path):
    model = ir.load(folded_flowers)
    limit = save.weight_bytes(model)
    assert save_model(model, tmp_path / "x.onnx", max_file_bytes=limit) is None
    assert names(tmp_path) == ["x.onnx"]
    assert data_file_of(tmp_path / "x.onnx") is None
    assert save_model(model, tmp_path / "x.onnx", max_file_bytes=limit - 1) is not None


def test_weights_beyond_the_limit_lie_in_a_file_named_for_its_contents(
    folded_flowers: Path, tmp_path: Path, random_pixels: MakePixels
):
    model = ir.load(folded_flowers)
    before = {value.name: value.const_value.numpy() for value in model.graph.initializers.values()}
    data = save_model(model, tmp_path / "x.onnx", max_file_bytes=10_000)
    assert data is not None
    assert names(tmp_path) == [data.name, "x.onnx"]
    assert data.name == f"x.{sha256_of_file(tmp_path / data.name)[:12]}.data"
    assert data == data_file_of(tmp_path / "x.onnx")
    assert data.sha256 == sha256_of_file(tmp_path / data.name)
    assert graph_size_bytes(tmp_path / "x.onnx") == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert (tmp_path / "x.onnx").stat().st_size < folded_flowers.stat().st_size / 2
    onnx.checker.check_model(str(tmp_path / "x.onnx"), full_check=True)
    written = onnx.load(tmp_path / "x.onnx")  # reads the data file
    assert {tensor.name for tensor in written.graph.initializer} == before.keys()
    for tensor in written.graph.initializer:
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor), before[tensor.name], strict=True)
    # The caller's model still holds its own tensors.
    assert not any(isinstance(each.const_value, ir.ExternalTensor) for each in model.graph.initializers.values())
    assert "vpdeploy.data" not in model.metadata_props


def test_equal_models_are_equal_files(folded_flowers: Path, tmp_path: Path):
    digests = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_model(ir.load(folded_flowers), tmp_path / name / "x.onnx", max_file_bytes=10_000)
        append_metadata(tmp_path / name / "x.onnx", {"k": "v"})
        digests.append({file.name: sha256_of_file(file) for file in (tmp_path / name).iterdir()})
    assert digests[0] == digests[1]


def test_a_model_read_from_two_files_is_written_as_one_and_back(folded_flowers: Path, tmp_path: Path):
    (tmp_path / "two").mkdir()
    save_model(ir.load(folded_flowers), tmp_path / "two" / "x.onnx", max_file_bytes=10_000)
    model = ir.load(tmp_path / "two" / "x.onnx")
    with staging_folder(tmp_path / "two" / "x.onnx") as folder:
        save_model(model, folder / "x.onnx", max_file_bytes=10_000)
        append_metadata(folder / "x.onnx", {"note": "again"})
        move_graph(folder / "x.onnx", tmp_path / "two" / "x.onnx")
    onnx.checker.check_model(str(tmp_path / "two" / "x.onnx"))
    assert len(names(tmp_path / "two")) == 2


# --- folded ---


def test_a_folded_model_of_two_files_answers_as_the_one_file_does(
    split_flowers: Path, folded_flowers: Path, random_pixels: MakePixels
):
    pixels = random_pixels(4)
    assert names(split_flowers.parent) == [the_data(split_flowers.parent).name, "flowers.onnx"]
    np.testing.assert_allclose(logits(split_flowers, pixels), logits(folded_flowers, pixels), rtol=1e-5, atol=1e-5)
    card = FoldedCard.read(split_flowers)
    assert card is not None
    assert card.task.details["parity"]["images"] > 0


def test_the_report_counts_both_files(
    small_limit: None, traced: Traced, tiny_run_paths: dict[str, Path], tmp_path: Path
):
    report = export_folded(tiny_run_paths["flowers"], tmp_path / "flowers.onnx")
    assert report.size_bytes == sum(file.stat().st_size for file in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "the graph's data file is missing; restore it or export again"),
        (lambda path: os.truncate(path, 5_000), r"expected \d+ bytes, found 5000; restore it or export again"),
        (
            lambda path: path.write_bytes(bytes(path.stat().st_size)),
            "contents do not match the sha256 the graph gives; export again",
        ),
    ],
    ids=["missing", "truncated", "swapped"],
)
def test_a_damaged_data_file_is_refused_by_its_name(
    split_flowers: Path, split_zoo: Path, damage: Callable[[Path], object], message: str
):
    for path, folder in ((split_flowers, split_flowers.parent), (split_zoo, split_zoo)):
        file = the_data(folder)
        damage(file)
        with pytest.raises(BundleCorruptError, match=f"{file}: {message}") as raised:
            load(path)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["../x.data", "/etc/x.data", "x.bin", "a/b.data", "", "c:x.data"])
def test_a_data_file_elsewhere_is_refused(split_flowers: Path, name: str):
    model = onnx.load(split_flowers, load_external_data=False)
    (entry,) = (entry for entry in model.metadata_props if entry.key == "vpdeploy.data")
    entry.value = entry.value.replace(the_data(split_flowers.parent).name, name)
    onnx.save(model, split_flowers)
    with pytest.raises(BundleCorruptError, match="is not the name of a data file beside the graph"):
        Artifact.open(split_flowers)


def test_the_digest_of_a_folded_model_changes_with_its_data(
    split_flowers: Path, traced: Traced, tiny_run_paths: dict[str, Path]
):
    first = Artifact.open(split_flowers).sha256
    traced(other_weights)
    export_folded(tiny_run_paths["flowers"], split_flowers)
    assert Artifact.open(split_flowers).sha256 != first


def test_exporting_again_over_a_pair_leaves_the_new_pair_alone(
    split_flowers: Path, traced: Traced, tiny_run_paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    folder, old = split_flowers.parent, the_data(split_flowers.parent)
    traced(other_weights)
    export_folded(tiny_run_paths["flowers"], split_flowers)
    new = the_data(folder)
    assert new != old
    assert names(folder) == [new.name, "flowers.onnx"]
    Artifact.open(split_flowers)
    monkeypatch.setattr(save, "MAX_FILE_BYTES", 10**9)
    export_folded(tiny_run_paths["flowers"], split_flowers)
    assert names(folder) == ["flowers.onnx"]


def test_a_copy_under_another_name_keeps_the_data_file_it_reads(
    split_flowers: Path, traced: Traced, tiny_run_paths: dict[str, Path]
):
    shutil.copy(split_flowers, split_flowers.parent / "copy.onnx")
    traced(other_weights)
    export_folded(tiny_run_paths["flowers"], split_flowers.parent / "copy.onnx")
    Artifact.open(split_flowers)
    Artifact.open(split_flowers.parent / "copy.onnx")


@pytest.mark.parametrize("step", ["gate", "card", "graph's rename", "data's rename"])
@pytest.mark.parametrize("existing", [True, False])
def test_a_failing_export_leaves_the_old_pair_or_nothing(
    split_flowers: Path,
    traced: Traced,
    tiny_run_paths: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    existing: bool,
):
    out = split_flowers if existing else tmp_path / "new" / "flowers.onnx"
    out.parent.mkdir(exist_ok=True)
    before = {file.name: file.read_bytes() for file in out.parent.iterdir()}
    real_replace = Path.replace

    def fail(*_: object, **__: object) -> Any:
        raise OSError(28, "No space left on device")

    def rename(source: Path, target: Path) -> Path:
        suffix = ".onnx" if step.startswith("graph") else ".data"
        final = Path(target).parent == out.parent and Path(target).suffix == suffix
        return fail() if final else real_replace(source, target)

    traced(other_weights)
    with monkeypatch.context() as patched:
        if step == "gate":
            patched.setattr(export, "run_gate", fail)
        elif step == "card":
            patched.setattr(folded, "append_metadata", fail)
        else:
            patched.setattr(Path, "replace", rename)
        with pytest.raises(OSError, match="No space left"):
            export_folded(tiny_run_paths["flowers"], out)
    assert {file.name: file.read_bytes() for file in out.parent.iterdir()} == before


# --- bundle ---


def test_a_bundle_of_two_graph_files_answers_as_the_one_file_does(
    split_zoo: Path, zoo: Path, random_pixels: MakePixels
):
    pixels = random_pixels(6)
    data = Bundle.open(split_zoo).manifest.graph_data
    assert data is not None
    assert names(split_zoo) == sorted(["manifest.json", "model.onnx", "tasks", data.name])
    np.testing.assert_allclose(logits(split_zoo, pixels), logits(zoo, pixels), rtol=1e-5, atol=1e-5)
    publish_task(split_zoo, Bundle.open(split_zoo).read_task("birds"))
    assert Bundle.open(split_zoo).manifest.graph_data == data


def test_exporting_again_over_a_bundle_replaces_both_graph_files_and_cleans_up(
    split_zoo: Path, traced: Traced, tiny_run_paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    old = the_data(split_zoo)
    (split_zoo / "model.0123456789ab.data").write_bytes(b"left by a killed export")
    (split_zoo / "mine.data").write_bytes(b"not ours")
    traced(other_weights)
    export_bundle([tiny_run_paths["birds"]], split_zoo, existing="replace")
    manifest = Bundle.open(split_zoo).manifest
    assert manifest.graph_data is not None
    assert manifest.graph_data.name != old.name
    expected = [manifest.graph_file, manifest.graph_data.name, "manifest.json", "mine.data", "tasks"]
    assert names(split_zoo) == sorted(expected)
    Bundle.open(split_zoo).verified_graph()
    monkeypatch.setattr(save, "MAX_FILE_BYTES", 10**9)
    export_bundle([tiny_run_paths["birds"]], split_zoo, existing="replace")
    assert Bundle.open(split_zoo).manifest.graph_data is None
    assert names(split_zoo) == sorted(["manifest.json", "mine.data", "model.onnx", "tasks"])


def test_the_same_graph_again_keeps_its_data_file(split_zoo: Path, tiny_run_paths: dict[str, Path], traced: Traced):
    before = the_data(split_zoo)
    export_bundle([tiny_run_paths["birds"]], split_zoo, existing="replace")
    assert the_data(split_zoo) == before
    Bundle.open(split_zoo).verified_graph()


def test_a_bundle_killed_before_its_manifest_keeps_the_old_pair(
    split_zoo: Path, traced: Traced, tiny_run_paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    class Killed(BaseException):
        pass

    def die(*_: object) -> None:
        raise Killed

    old = Bundle.open(split_zoo).manifest
    traced(other_weights)
    with monkeypatch.context() as patched:
        patched.setattr("vpdeploy.format.bundle._replace_manifest", die)
        with pytest.raises(Killed):
            export_bundle([tiny_run_paths["birds"]], split_zoo, existing="replace")
    assert Bundle.open(split_zoo).manifest == old
    Bundle.open(split_zoo).verified_graph()


def test_no_graph_at_all_publishes_nothing(tmp_path: Path):
    with pytest.raises(BundleError, match=r"x\.onnx: cannot be read"), staging_folder(tmp_path / "x.onnx") as folder:
        move_graph(folder / "x.onnx", tmp_path / "x.onnx")
    assert names(tmp_path) == []


# --- other readers ---


def test_tensorrt_reads_the_data_file_beside_the_graph(split_zoo: Path):
    toolkit = pytest.importorskip("tensorrt_rtx", reason="needs the rtx extra")
    logger = toolkit.Logger(toolkit.Logger.INTERNAL_ERROR)
    builder = toolkit.Builder(logger)
    flags = 1 << int(toolkit.NetworkDefinitionCreationFlag.STRONGLY_TYPED)

    def parses() -> bool:
        network = builder.create_network(flags)
        return bool(toolkit.OnnxParser(network, logger).parse_from_file(str(split_zoo / "model.onnx")))

    assert parses()
    the_data(split_zoo).unlink()
    assert not parses()


# --- the real size ---

LARGE_SIDE = 64


def large_model(sides: int, layers: int) -> ir.Model:
    """A folded model with ``layers`` weights of ``sides`` by ``sides`` float32, made when they are written."""

    def weight(index: int) -> ir.LazyTensor:
        def make() -> ir.Tensor:
            values = np.zeros((sides, sides), np.float32)
            np.fill_diagonal(values, index + 1)
            return ir.Tensor(values, name=f"weight_{index}")

        return ir.LazyTensor(make, ir.DataType.FLOAT, shape=ir.Shape((sides, sides)), name=f"weight_{index}")

    image = ir.val("image", ir.DataType.UINT8, ("batch", LARGE_SIDE, LARGE_SIDE, 3))
    shape = ir.val("shape", const_value=ir.tensor(np.array([-1, sides], np.int64), name="shape"))
    floats = ir.node("Cast", [image], {"to": ir.DataType.FLOAT})
    nodes = [floats, ir.node("Reshape", [floats.outputs[0], shape])]
    weights = [ir.val(f"weight_{index}", const_value=weight(index)) for index in range(layers)]
    for each in weights:
        nodes.append(ir.node("MatMul", [nodes[-1].outputs[0], each]))
    logits = nodes[-1].outputs[0]
    logits.name, logits.type, logits.shape = "logits", ir.TensorType(ir.DataType.FLOAT), ir.Shape(("batch", sides))
    graph = ir.Graph([image], [logits], nodes=nodes, initializers=[shape, *weights], opset_imports={"": 20}, name="g")
    return ir.Model(graph, ir_version=10)


LARGE = """
import resource, sys
from pathlib import Path
import numpy as np
from test_onnx_save import LARGE_SIDE, large_card, large_model
from vpdeploy_export.onnx.save import save_model, staging_folder
from vpdeploy.format.datafile import move_graph
from vpdeploy.format.onnxfile import append_metadata
from vpdeploy import load

path, sides, layers = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with staging_folder(path) as folder:
    save_model(large_model(sides, layers), folder / path.name)
    append_metadata(folder / path.name, large_card(sides).to_metadata())
    move_graph(folder / path.name, path)
print("peak", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
pixels = np.zeros((1, LARGE_SIDE, LARGE_SIDE, 3), np.uint8)
pixels[0, 0, 0] = 1, 2, 3
with load(path, threads=1) as session:
    print("logits", *session.run(pixels, np.zeros(1, np.int32))[0, :4])
"""


def large_card(classes: int) -> FoldedCard:
    backbone = BackboneId(name="large", sha256="ab" * 32, depth=1, width=4, heads=1, patch_size=4)
    size = Preprocessing(image_size=LARGE_SIDE, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    labels = tuple(map(str, range(classes)))
    card = TaskCard(name="large", labels=labels, method="linear", backbone=backbone, preprocessing=size)
    return FoldedCard(task=card, graph=GraphFacts(precision="fp32", opset=20, image_input="uint8"))


@pytest.mark.slow
def test_a_model_above_two_gigabytes_is_written_and_run_without_copies_in_memory(tmp_path: Path):
    sides, layers = LARGE_SIDE * LARGE_SIDE * 3, 4  # 604 MB each
    if shutil.disk_usage(tmp_path).free < 6 * 10**9:
        pytest.skip("needs 6 GB of free disk")
    arguments = [str(tmp_path / "large.onnx"), str(sides), str(layers)]
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LARGE), *arguments],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])},
    )
    peak, logits = finished.stdout.splitlines()
    data = data_file_of(tmp_path / "large.onnx")
    assert data is not None
    assert data.size_bytes > 2**31
    # One tensor, made when it is written; never the model.
    assert int(peak.split()[1]) < 1.6 * sides * sides * 4
    assert logits.split()[1:] == ["24.0", "48.0", "72.0", "0.0"]  # diagonals 1, 2, 3, 4
