"""Imported checkpoints of the public code give the features and logits that the public code's modules gave."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from parity_files import (
    CASES,
    METHODS,
    SEGMENT_MASK,
    TOKEN_MASK,
    Arrays,
    difference,
    import_case,
    read_expected,
    read_state,
)
from torch import Tensor
from train.toys import features_with_prefixes, unmerged_prefixes

from vpdeploy_export.compilation import compile_prompts
from vpdeploy_train.methods.kept import Kept
from vpdeploy_train.prompted import PromptedViT
from vpdeploy_train.run import Run

TOLERANCE = 1e-9
PREFIX_CASES = [(name, case) for name, case in CASES if name in ("vpt_deep_toy", "e2vpt_toy")]

Case = tuple[PromptedViT, Arrays]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Case]:
    """Models of the imported runs, read back from disk, in float64, and what is expected of them."""
    folder = tmp_path_factory.mktemp("imported")
    loaded = {}
    for name, case in CASES:
        run = Run.read(import_case(name, case, folder).path)
        model = run.load_model(run.load_backbone()).double().eval()
        loaded[name, case] = (model, read_expected(name))
    return loaded


def normalise(expected: Arrays) -> Tensor:
    pixels = (expected["images"].astype(np.float64) / 255 - expected["mean"]) / expected["std"]
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def assert_expected(model: PromptedViT, features: Tensor, expected: Arrays, case: str) -> None:
    logits: npt.NDArray[np.float64] = model.head(features).numpy()
    assert difference(features.numpy(), expected[f"{case}.cls_feature"]) < TOLERANCE
    assert difference(logits, expected[f"{case}.logits"]) < TOLERANCE


@pytest.mark.parametrize(("name", "case"), CASES)
def test_the_trained_form_reproduces_the_reference(cases, name, case):
    model, expected = cases[name, case]
    with torch.no_grad():
        assert_expected(model, model.features(normalise(expected)), expected, case)


@pytest.mark.parametrize(("name", "case"), PREFIX_CASES)
def test_the_compiled_and_merged_prefix_reproduces_the_reference(cases, name, case):
    model, expected = cases[name, case]
    merged = compile_prompts(model).blocks
    with torch.no_grad():
        prefixes = unmerged_prefixes(model)
        # Two of eight tokens are pruned, and become one column.
        assert [prefix.key.shape[1] for prefix in prefixes] == [13 if name == "e2vpt_toy" else 6] * 3
        assert [prefix.key.shape[1] for prefix in merged] == [12 if case == "pruned" else len(prefixes[0].bias)] * 3
        pixels = normalise(expected)
        assert_expected(model, features_with_prefixes(model.vit, pixels, prefixes), expected, case)
        assert_expected(model, features_with_prefixes(model.vit, pixels, merged), expected, case)


@pytest.mark.parametrize(("name", "case"), CASES)
def test_the_run_says_what_was_imported(tmp_path: Path, name, case):
    run = Run.read(import_case(name, case, tmp_path).path)
    assert run.card.method == METHODS[name]
    assert run.card.details["imported"]["format"] in ("vpt", "e2vpt", "vapt")
    preprocessing, expected = run.card.preprocessing, read_expected(name)
    assert preprocessing.mean == tuple(expected["mean"])
    assert preprocessing.std == tuple(expected["std"])
    assert preprocessing.image_size == expected["images"].shape[1]


def test_the_masks_stored_in_the_checkpoint_are_those_of_the_pruned_case():
    state, expected = read_state("e2vpt_toy"), read_expected("e2vpt_toy")
    assert np.array_equal(state[TOKEN_MASK].numpy(), expected["pruned.token_mask"])
    assert np.array_equal(state[SEGMENT_MASK].numpy(), expected["pruned.segment_mask"])


def test_removing_the_pruned_tokens_is_another_function_than_the_references_zeros(cases):
    model, expected = cases["e2vpt_toy", "pruned"]
    live = tuple(np.flatnonzero(expected["pruned.token_mask"]).tolist())
    kept = Kept(
        tokens=(live,) * 3,
        kv_tokens=model.method.kept.kv_tokens,
        segments=tuple(tuple(block[token] for token in live) for block in model.method.kept.segments),
    )
    smaller = PromptedViT(model.vit, model.method.pruned_to(kept, model.method.state_dict()), 7).double().eval()
    with torch.no_grad():
        removed = smaller.features(normalise(expected)).numpy()
    assert difference(removed, expected["pruned.cls_feature"]) > 1e-3
