"""Every method, deployed: folded, in a bundle where it can be, and refused with the reason where it cannot."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_runs
import torch
from core import toy
from exports import add_to_bundle, export_bundle, export_folded

from vpdeploy import load
from vpdeploy.errors import LayoutMismatchError, SpecError
from vpdeploy.format.bundle import Bundle
from vpdeploy.format.graphfacts import Precision
from vpdeploy.format.layout import Family
from vpdeploy.session.session import Session
from vpdeploy_train.methods import METHODS
from vpdeploy_train.methods.kept import Kept, PrunableMethod
from vpdeploy_train.prompted import PromptedViT, normalise_pixels

MakePixels = Callable[..., np.ndarray]

OPTIONS = {"prompt_tokens": 5, "kv_tokens": 3, "vapt_hidden": 4, "lora_rank": 3}
CLASSES = {
    "e2vpt": 3,
    "vapt": 4,
    **dict.fromkeys(("vpt-deep", "vfpt", "da-vpt"), 5),
    "vpt-shallow": 6,
    **dict.fromkeys(("linear", "lora", "full"), 7),
    "vapt-paper": 8,
    "vapt-pruned": 9,
}
"""Of methods whose folded graphs differ in numbers only, the same: they share a trace."""
ADAPTIVE = ("vapt", "vapt-pruned", "linear")
PAPER = ("vapt-paper", "linear")
SUPERSET = ("e2vpt", "vapt", "vpt-deep", "vfpt", "da-vpt", "vapt-pruned", "linear")
PREFIX = ("e2vpt", "vpt-deep", "vfpt", "da-vpt", "linear")
PRUNED = Kept(
    tokens=((0, 3, 4), (), (2,)),
    kv_tokens=((),) * 3,
    segments=(((True,) * 16,) * 3, (), ((True,) * 16,)),
    hidden=(0, 2),
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.write_weights(tmp_path_factory.mktemp("weights") / "vit.safetensors")


@pytest.fixture(scope="module")
def models(weights: Path) -> dict[str, PromptedViT]:
    backbone = tiny_runs.backbone_of(weights)
    made = {}
    for number, name in enumerate([*METHODS, "vapt-paper", "vapt-pruned"]):
        kind = name.partition("-p")[0]
        norm = "paper" if name == "vapt-paper" else "block"
        method = tiny_runs.random_method(backbone.vit, kind, seed=number, vapt_norm=norm, **OPTIONS)
        if name == "vapt-pruned":
            assert isinstance(method, PrunableMethod)
            method = method.pruned_to(PRUNED, method.state_dict()).eval()
        model = tiny_runs.prompted(backbone.vit, method, CLASSES[name], seed=number)
        if name == "full":
            with torch.no_grad():
                for parameter in model.method.parameters():
                    parameter.mul_(1.1)
        made[name] = model
    return made


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, weights: Path, models: dict[str, PromptedViT]) -> dict[str, Path]:
    folder, backbone = tmp_path_factory.mktemp("runs"), tiny_runs.backbone_of(weights)
    for name, model in models.items():
        kind = name.partition("-p")[0]
        tiny_runs.write_model(folder / name, model, backbone, name=name, method=kind, weights=weights)
    return {name: folder / name for name in models}


@pytest.fixture(scope="module")
def bundle_of(tmp_path_factory: pytest.TempPathFactory, runs: dict[str, Path]) -> Callable[..., Path]:
    """Bundles by their tasks, each exported once: tracing takes seconds."""

    @functools.cache
    def export(*tasks: str, precision: Precision = "fp32", family: Family | None = None) -> Path:
        zoo = tmp_path_factory.mktemp("bundles") / "zoo"
        export_bundle([runs[task] for task in tasks], zoo, precision=precision, family=family)
        return zoo

    return export


def trained_answer(model: PromptedViT, pixels: np.ndarray) -> np.ndarray:
    mean, std = torch.tensor(tiny_runs.PREPROCESSING.mean), torch.tensor(tiny_runs.PREPROCESSING.std)
    with torch.no_grad():
        return model.eval()(normalise_pixels(torch.from_numpy(pixels), mean, std)).numpy()


def close(found: np.ndarray, expected: np.ndarray, tolerance: float = 1e-4) -> None:
    assert np.abs(found - expected).max() <= tolerance * max(1.0, np.abs(expected).max())


def test_methods_differ_so_that_a_mix_up_would_show(models: dict[str, PromptedViT], random_pixels: MakePixels):
    pixels = random_pixels(4)
    answers = [trained_answer(model, pixels)[:, :3] for model in models.values()]
    gaps = [np.abs(one - other).max() for index, one in enumerate(answers) for other in answers[:index]]
    assert min(gaps) > 0.05


@pytest.mark.parametrize(
    ("name", "precision"),
    [*((name, "fp32") for name in [*METHODS, "vapt-paper", "vapt-pruned"]), ("vapt", "fp16"), ("vpt-shallow", "fp16")],
)
def test_the_folded_file_answers_as_the_trained_model(runs, models, random_pixels, tmp_path, name, precision):
    pixels = random_pixels(5)
    export_folded(runs[name], tmp_path / "task.onnx", precision=precision)
    with load(tmp_path / "task.onnx", threads=1) as session:
        found = session.run(pixels, np.zeros(5, np.int32))
    close(found, trained_answer(models[name], pixels), 1e-4 if precision == "fp32" else 2e-2)


def mixed_answers(session: Session, models: dict[str, PromptedViT], pixels: np.ndarray, tolerance: float) -> None:
    """Every image to every task, all in one batch."""
    tasks = session.tasks
    leases = [session.lease(task) for task in tasks]
    slots = np.repeat(np.array([lease.slot for lease in leases], np.int32), len(pixels))
    order = np.random.default_rng(0).permutation(len(slots))
    found = np.empty_like(session.run(np.concatenate([pixels] * len(tasks)), slots))
    found[order] = session.run(np.concatenate([pixels] * len(tasks))[order], slots[order])
    for index, task in enumerate(tasks):
        expected = trained_answer(models[task], pixels)
        rows = found[index * len(pixels) : (index + 1) * len(pixels)]
        close(rows[:, : expected.shape[1]], expected, tolerance)
        assert (rows[:, expected.shape[1] :] < -20000).all()
    for lease in leases:
        lease.release()


@pytest.mark.parametrize(
    ("tasks", "family", "precision"),
    [
        pytest.param(ADAPTIVE, "adaptive", "fp32", marks=pytest.mark.slow),
        (PAPER, "adaptive", "fp32"),
        (PREFIX, "prefix", "fp32"),
        pytest.param(SUPERSET, "superset", "fp32", marks=pytest.mark.slow),
        (SUPERSET, "superset", "fp16"),
    ],
)
def test_a_bundle_answers_all_its_tasks_in_one_batch(bundle_of, models, random_pixels, tasks, family, precision):
    zoo = bundle_of(*tasks, precision=precision)
    assert Bundle.open(zoo).manifest.layout.family == family
    with load(zoo, threads=1) as session:
        mixed_answers(session, models, random_pixels(3), 1e-4 if precision == "fp32" else 2e-2)


def test_a_superset_can_be_prepared_for_tasks_to_come(runs, bundle_of, models, random_pixels):
    zoo = bundle_of("e2vpt", family="superset")
    with load(zoo, threads=1) as session:
        add_to_bundle(zoo, runs["vapt"])
        assert session.sync().added == ("vapt",)
        mixed_answers(session, models, random_pixels(2), 1e-4)


def test_a_pruned_adaptive_task_is_smaller_and_needs_no_padding_of_others(bundle_of, models):
    bundle = Bundle.open(bundle_of(*ADAPTIVE))
    whole, pruned = bundle.read_task("vapt"), bundle.read_task("vapt-pruned")
    assert whole.sizes() == {"prefix": 5, "generated": 5, "hidden": 4, "classes": 4}
    assert pruned.sizes() == {
        "prefix": 3,
        "generated": 1,
        "hidden": 2,
        "classes": models["vapt-pruned"].head.out_features,
    }
    weights = [name for name in whole.tensors if name.startswith("generator")]
    assert sum(pruned.tensors[name].nbytes for name in weights) < sum(whole.tensors[name].nbytes for name in weights)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("vpt-shallow", "prompts change from block to block with the image.*export it alone as FILE.onnx"),
        ("lora", "method 'lora' changes the backbone's weights.*export it alone as FILE.onnx"),
        ("full", "method 'full' changes the backbone's weights.*export it alone as FILE.onnx"),
    ],
)
def test_what_cannot_be_switched_is_refused_with_the_reason(runs, tmp_path, name, reason):
    with pytest.raises(SpecError, match=reason):
        export_bundle([runs[name]], tmp_path / "zoo")
    assert not (tmp_path / "zoo").exists()


def test_generators_of_different_norms_do_not_share_a_graph(runs, tmp_path):
    with pytest.raises(SpecError, match=r"tasks 'vapt' and 'vapt-paper'.*eps.*export them into two bundles"):
        export_bundle([runs["vapt"], runs["vapt-paper"]], tmp_path / "zoo")


def test_a_family_that_the_tasks_do_not_fit_is_refused(runs, tmp_path):
    with pytest.raises(SpecError, match="--layout prefix: task 'vapt' has adaptive prompts; use superset"):
        export_bundle([runs["vapt"]], tmp_path / "zoo", family="prefix")
    with pytest.raises(SpecError, match="--layout adaptive: task 'e2vpt' has prompts in every block; use superset"):
        export_bundle([runs["e2vpt"], runs["vapt"]], tmp_path / "zoo", family="adaptive")


@pytest.mark.parametrize(("tasks", "second"), [(("e2vpt",), "vapt"), (ADAPTIVE, "e2vpt"), (PAPER, "vapt")])
def test_a_task_that_the_bundles_graph_has_no_place_for_is_not_added(runs, bundle_of, tasks, second):
    zoo = bundle_of(*tasks)
    before = toy.snapshot(zoo)
    with pytest.raises(LayoutMismatchError, match=f"task '{second}'.*(--layout superset|into another bundle)"):
        add_to_bundle(zoo, runs[second])
    assert toy.snapshot(zoo) == before


def test_merging_lora_leaves_the_trained_model_usable(runs, models, random_pixels, tmp_path):
    pixels = random_pixels(2)
    before = trained_answer(models["lora"], pixels)
    export_folded(runs["lora"], tmp_path / "task.onnx")
    np.testing.assert_array_equal(trained_answer(models["lora"], pixels), before)


@pytest.mark.parametrize("name", ["full", "lora"])
def test_methods_that_own_weights_leave_the_shared_backbone_alone(weights, name, random_pixels):
    vit = tiny_runs.backbone_of(weights).vit
    before = {key: value.clone() for key, value in vit.state_dict().items()}
    model = tiny_runs.prompted(vit, tiny_runs.random_method(vit, name, **OPTIONS), 3)
    model.train()
    optimizer = torch.optim.SGD(model.method.parameters(), lr=1.0)
    model(torch.randn(2, 3, tiny_runs.SIDE, tiny_runs.SIDE)).sum().backward()
    optimizer.step()
    assert all(torch.equal(vit.state_dict()[key], value) for key, value in before.items())
    assert all(parameter.grad is None for parameter in vit.parameters())
