"""Which checkpoints become runs, and what is said of those that do not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parity_files import SEGMENT_MASK, TOKEN_MASK, State, import_case, path_of, read_state, save
from train.imports import (
    DEEP,
    KERNEL,
    KEY_VALUES,
    LINEAR,
    POSITIONS,
    PROMPTS,
    assert_refused,
    changed,
    importing,
    model_of,
)
from train.toys import features_with_tokens, random_pixels

from vpdeploy.errors import SpecError
from vpdeploy_train.evaluation import evaluate_run
from vpdeploy_train.importing.backbone import BackboneChoice
from vpdeploy_train.importing.checkpoint import Checkpoint
from vpdeploy_train.run import Run

# --- files that are taken ---


def test_a_plain_state_dict_and_dataparallel_keys_are_the_same_run(tmp_path: Path):
    state = read_state("vpt_deep_toy")
    torch.save(state, tmp_path / "plain.pth")
    save(tmp_path / "parallel.pth", {f"module.{key}": value for key, value in state.items()})
    expected = importing(path_of("vpt_deep_toy"), tmp_path / "expected")
    for name in ("plain", "parallel"):
        found = importing(tmp_path / f"{name}.pth", tmp_path / name)
        assert found.card.backbone == expected.card.backbone
        assert all(torch.equal(found.state[key], value) for key, value in expected.state.items())


def test_half_precision_is_widened_exactly(tmp_path: Path):
    state = {key: value.half() for key, value in read_state("vpt_deep_toy").items()}
    run = importing(save(tmp_path / "half.pth", state), tmp_path / "out")
    assert torch.equal(run.state["method.visual.0"], state[PROMPTS][0].float())


def test_tensors_beside_the_model_are_not_read(tmp_path: Path):
    torch.save({"model": read_state("vpt_deep_toy"), "iteration": 7, "optimizer": {}}, tmp_path / "more.pth")
    assert importing(tmp_path / "more.pth", tmp_path / "out").card.method == "vpt-deep"


def test_a_linear_prompt_projection_is_applied(tmp_path: Path):
    source = torch.Generator().manual_seed(0)
    narrow, weight, bias = (torch.randn(shape, generator=source) for shape in ((3, 6, 20), (48, 20), (48,)))

    def project(state: State) -> None:
        state[PROMPTS], state[DEEP] = narrow[:1], narrow[1:]
        state["enc.transformer.prompt_proj.weight"], state["enc.transformer.prompt_proj.bias"] = weight, bias

    path = changed(tmp_path, "vpt_deep_toy", project)
    run = importing(path, tmp_path / "out")
    for index in range(3):
        expected = torch.einsum("tp,dp->td", narrow[index].double(), weight.double()) + bias.double()
        assert torch.allclose(run.state[f"method.visual.{index}"].double(), expected, atol=1e-6)
    shallow = changed(tmp_path, "vpt_deep_toy", lambda state: (project(state), state.pop(DEEP)))
    run = importing(shallow, tmp_path / "shallow")
    assert run.state["method.visual"].shape == (6, 48)


def test_real_valued_masks_are_folded_into_the_prompts(tmp_path: Path):
    source = torch.Generator().manual_seed(0)
    masks = {TOKEN_MASK: torch.rand(8, generator=source), SEGMENT_MASK: torch.rand(8, 16, generator=source)}
    masks[TOKEN_MASK][2] = 0
    path = changed(tmp_path, "e2vpt_toy", lambda state: state.update(masks))
    state = read_state("e2vpt_toy")
    run = importing(path, tmp_path / "out", format="e2vpt", backbone=BackboneChoice())
    model = model_of(run).double()
    prompts = torch.cat([state[PROMPTS], state[DEEP]]).double()
    factors = masks[TOKEN_MASK].double()[:, None] * masks[SEGMENT_MASK].double()
    visual = [block * torch.stack([factors[:, channel % 16] for channel in range(48)], dim=1) for block in prompts]
    kv = [(state[KEY_VALUES.format(index)].double(),) * 2 for index in range(3)]
    pixels = random_pixels(2, side=64)
    with torch.no_grad():
        expected = features_with_tokens(model.vit, pixels, visual, kv)
        assert torch.allclose(model.features(pixels), expected, atol=1e-5)  # the products are rounded to float32 once
    assert run.card.details["prompts"]["segments_kept"] == 3 * 7 * 16


def test_masks_and_key_value_prompts_may_be_absent(tmp_path: Path):
    path = changed(tmp_path, "e2vpt_toy", lambda state: [state.pop(key) for key in (TOKEN_MASK, SEGMENT_MASK)])
    run = importing(path, tmp_path / "unmasked", format="e2vpt", backbone=BackboneChoice())
    assert torch.equal(run.state["method.visual.0"], read_state("e2vpt_toy")[PROMPTS][0])
    path = changed(tmp_path, "e2vpt_toy", lambda state: [state.pop(KEY_VALUES.format(index)) for index in range(3)])
    run = importing(path, tmp_path / "without", format="e2vpt")
    assert run.card.details["prompts"]["kv_tokens_per_block"] == [0, 0, 0]


def test_the_run_is_evaluated_only_on_data_that_is_given(tmp_path: Path):
    path = import_case("vpt_deep_toy", "plain", tmp_path).path
    with pytest.raises(SpecError, match="was imported, so it names no data of its own; give --data"):
        evaluate_run(Run.read(path), split="test")


def test_the_run_is_evaluated_with_the_labels_that_were_given(tmp_path: Path, colours: Path):
    def keep_three(state: State) -> None:
        for kind in ("weight", "bias"):
            state[f"head.last_layer.{kind}"] = state[f"head.last_layer.{kind}"][:3]

    path = changed(tmp_path, "vpt_deep_toy", keep_three)
    importing(path, tmp_path / "out", labels=["blue", "green", "red"])
    found = evaluate_run(Run.read(tmp_path / "out"), data=str(colours), split="test", device="cpu")
    result, labels = found.evaluation, found.to_json()["labels"]
    assert labels == ["blue", "green", "red"]
    assert result.images > 0


# --- files that are refused ---


@pytest.mark.parametrize(
    ("name", "format", "match"),
    [
        ("vpt_deep_toy", "vapt", "asks for VAPT, but '.*prompt_embeddings' is VPT's .*; use --format vpt"),
        ("vpt_deep_toy", "e2vpt", "asks for E²VPT, but .* use --format vpt"),
        ("e2vpt_toy", "vpt", "but '.*prompt_soft_tokens_mask_cls_token' is E²VPT's; use --format e2vpt"),
        ("vapt_toy", "vpt", "but '.*' is VAPT's; use --format vapt"),
        ("vpt_deep_toy", "lora", "--format 'lora': choose one of e2vpt, vapt, vpt"),
    ],
)
def test_another_format_than_the_files_is_refused(tmp_path: Path, name: str, format: str, match: str):
    assert_refused(changed(tmp_path, name, lambda state: None), match, format=format)


def set_entry(key: str, index: tuple[int, ...], value: float) -> Callable[[State], object]:
    def change(state: State) -> None:
        state[key] = state[key].clone()
        state[key][index] = value

    return change


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("vpt_deep_toy", lambda s: s.pop("head.last_layer.bias"), "key 'head.last_layer.bias' is missing; check --for"),
        (
            "vpt_deep_toy",
            lambda s: s.pop("enc.transformer.encoder.layer.1.ffn.fc2.weight"),
            "key 'enc.transformer.encoder.layer.1.ffn.fc2.weight' is missing",
        ),
        (
            "vpt_deep_toy",
            lambda s: [s.pop(key) for key in list(s) if ".layer.1." in key],
            "key 'enc.transformer.encoder.layer.1.attn.query.weight' is missing",
        ),
        ("vpt_deep_toy", lambda s: s.update({DEEP: s[DEEP][:1]}), r"\(1, 6, 48\); expected \(2, 6, 48\)"),
        ("vpt_deep_toy", lambda s: s.update({DEEP: s[DEEP][..., :40]}), r"\(2, 6, 40\); expected \(2, 6, 48\)"),
        ("vpt_deep_toy", lambda s: s.update({PROMPTS: s[PROMPTS][:, :0]}), r"\(1, 0, 48\); expected \(1, T, 48\)"),
        ("vpt_deep_toy", lambda s: s.update({POSITIONS: s[POSITIONS][:, :16]}), "15 patches, which are no square grid"),
        (
            "vpt_deep_toy",
            lambda s: s.update({"enc.transformer.prompt_gate": torch.ones(3)}),
            "key 'enc.transformer.prompt_gate' has no meaning here, .* docs/import.md",
        ),
        (
            "vpt_deep_toy",
            lambda s: s.update({"head.projection.weight": torch.ones(3), "x": torch.ones(1)}),
            r"key 'head.projection.weight' \(and 1 more\) has no meaning",
        ),
        (
            "vpt_deep_toy",
            lambda s: s.update({"enc.blocks.0.norm1.weight": torch.ones(48)}),
            "'enc.blocks.0.norm1.weight' is no part of the public code's ViT, .* Swin, MAE and MoCo",
        ),
        ("vpt_deep_toy", set_entry(DEEP, (1, 2, 3), float("nan")), f"'{DEEP}' holds NaN or infinity"),
        ("vpt_deep_toy", lambda s: s.update({PROMPTS: s[PROMPTS].double() * 1e300}), "holds NaN or infinity"),
        ("vpt_deep_toy", lambda s: s.update({PROMPTS: s[PROMPTS].int()}), "is torch.int32, .* floating point"),
        ("vpt_deep_toy", lambda s: s.update({PROMPTS: s[PROMPTS].to("meta")}), "is torch.float32, meta; .* dense"),
        (
            "vpt_deep_toy",
            lambda s: s.update({PROMPTS: torch.zeros(1, 1, 48).expand(1, 10**9, 48)}),
            "claims more numbers than the file holds",
        ),
        ("e2vpt_toy", lambda s: s.pop(KEY_VALUES.format(1)), "layer.1.attn.deep_QKV_embeddings' is missing"),
        (
            "e2vpt_toy",
            lambda s: s.update({KEY_VALUES.format(0): torch.ones(5, 5, 16)}),
            "5 heads of width 16, which do not make the token width 48",
        ),
        (
            "e2vpt_toy",
            lambda s: s.update({KEY_VALUES.format(2): torch.ones(3, 4, 16)}),
            r"layer.2.* has shape \(3, 4, 16\); expected \(3, 5, 16\)",
        ),
        ("e2vpt_toy", lambda s: s.update({TOKEN_MASK: torch.ones(7)}), r"\(7,\); expected \(8\)"),
        ("e2vpt_toy", lambda s: s.update({SEGMENT_MASK: torch.ones(8, 7)}), "7 segments, into which prompts of width"),
        ("vapt_toy", lambda s: s.update({KERNEL: torch.ones(1, 1, 2, 3)}), r"\(1, 1, 2, 3\); expected \(1, 1, K, K\)"),
        (
            "vapt_toy",
            lambda s: s.update({KERNEL: torch.ones(1, 1, 3, 3)}),
            "169 positions, so the prompts were learned on a grid of 15x15 patches, and the backbone has 14x14",
        ),
        ("vapt_toy", lambda s: s.update({LINEAR: torch.ones(6, 170)}), "170 positions, which are no square grid"),
        ("vapt_toy", lambda s: s.pop(LINEAR), f"key '{LINEAR}' is missing"),
        (
            "vapt_toy",
            lambda s: s.update({"enc.transformer.deep_prompt_norm.2.weight": torch.ones(48)}),
            "deep_prompt_norm.2.weight' has no meaning here",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tensors_that_cannot_be_are_refused_by_their_key(tmp_path: Path, name: str, change: Any, match: str):
    format = name.split("_")[0]
    choice = BackboneChoice(heads=None if format == "e2vpt" else 3)
    assert_refused(changed(tmp_path, name, change), match, format=format, backbone=choice)


class Planted:
    """An object whose unpickling would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_objects_are_never_unpickled(tmp_path: Path):
    folder = tmp_path / "files"
    folder.mkdir()
    torch.save({"model": read_state("vpt_deep_toy"), "cfg": Planted(tmp_path / "planted")}, folder / "objects.pth")
    assert_refused(folder / "objects.pth", "objects.pth: cannot be read as a torch file of tensors alone")
    assert not (tmp_path / "planted").exists()


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_file_that_is_cut_off_is_refused(tmp_path: Path, share: float):
    content = path_of("vpt_deep_toy").read_bytes()
    path = tmp_path / "cut.pth"
    path.write_bytes(content[: int(share * len(content))])
    assert_refused(path, "cut.pth: cannot be read as a torch file of tensors alone: .* copy it again")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({}, "holds no state dict"),
        ([torch.ones(1)], "holds no state dict"),
        ({"model": {"epoch": 3}}, "'epoch' is a int; expected tensors only"),
        ({"model": {3: torch.ones(1)}}, "'3' is a Tensor; expected tensors only"),
        ({"model": {"fc.weight": torch.ones(1)}}, "none of its 1 keys is a prompt's"),
    ],
    ids=str,
)
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, content: Any, match: str):
    torch.save(content, tmp_path / "other.pth")
    assert_refused(tmp_path / "other.pth", match)


def test_a_folder_in_use_and_a_missing_file_are_refused(tmp_path: Path):
    out = tmp_path / "out"
    with pytest.raises(SpecError, match=r"none\.pth: file not found"):
        importing(tmp_path / "none.pth", out)
    out.mkdir()
    importing(path_of("vpt_deep_toy"), out)  # an empty folder may be there
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    with pytest.raises(SpecError, match=r"out: exists and is not empty; give another --out"):
        importing(path_of("vpt_shallow_toy"), out)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_every_file_of_a_run_can_be_read_by_others(tmp_path: Path):
    out = importing(path_of("vpt_deep_toy"), tmp_path / "out").path
    (tmp_path / "plain").touch()
    modes = {file.name: file.stat().st_mode & 0o777 for file in out.iterdir()}
    assert modes == dict.fromkeys(modes, (tmp_path / "plain").stat().st_mode & 0o777)


def test_all_keys_of_the_parity_files_are_read():
    checkpoint = Checkpoint.read(path_of("vpt_deep_toy"))
    with pytest.raises(SpecError, match=rf"'{PROMPTS}' \(and {len(checkpoint.keys) - 1} more\)"):
        checkpoint.require_all_taken()
