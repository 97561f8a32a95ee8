"""The pruning search: what is asked for, how far candidates are trained, the choice, and the report."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from train.toys import (
    CLASSES,
    DEPTH,
    PATCH,
    SIDE,
    WIDTH,
    dimensions_of,
    make_method,
    make_model,
    make_vit,
    random_pixels,
)

from vpdeploy.errors import SpecError
from vpdeploy_train.footprint import count_macs
from vpdeploy_train.methods.kept import Kept
from vpdeploy_train.methods.method import NoPrompts
from vpdeploy_train.methods.vapt import VAPT
from vpdeploy_train.prompted import PromptedViT
from vpdeploy_train.pruning.race import Rung, rungs_of
from vpdeploy_train.pruning.report import report_of
from vpdeploy_train.pruning.request import shares_to_try
from vpdeploy_train.pruning.scores import Scores
from vpdeploy_train.pruning.search import Candidate, choose, rank
from vpdeploy_train.settings import TrainSettings
from vpdeploy_train.shares import Shares
from vpdeploy_train.state import EpochRow

TOKENS = (SIDE // PATCH) ** 2 + 1


def candidate(
    phase: str, parameters: int, accuracy: float, loss: float = 1.0, *, model: Any = None, finished: bool = True
) -> Candidate:
    best = EpochRow(
        phase=phase,
        epoch=1,
        lr=0.0,
        train_loss=0.0,
        train_accuracy=1.0,
        val_loss=loss,
        val_accuracy=accuracy,
        images_per_second=1.0,
    )
    return Candidate(
        phase=phase,
        model=model,
        shares=Shares(),
        parameters=parameters,
        start=None,
        best=best,
        epochs=1,
        finished=finished,
    )


@pytest.mark.parametrize(
    ("candidates", "slack", "chosen"),
    [
        ([("train", 100, 0.9), ("prune-1", 50, 0.9), ("prune-2", 25, 0.8)], 0.0, "prune-1"),
        ([("train", 100, 0.9), ("prune-1", 50, 0.8), ("prune-2", 25, 0.7)], 0.0, "train"),
        ([("train", 100, 0.8), ("prune-1", 50, 0.9), ("prune-2", 25, 0.8)], 0.0, "prune-1"),
        ([("train", 100, 0.9), ("prune-1", 50, 0.86), ("prune-2", 25, 0.8)], 0.05, "prune-1"),
        ([("train", 100, 0.9), ("prune-1", 50, 0.86), ("prune-2", 25, 0.8)], 0.1, "prune-2"),
        ([("train", 100, 0.9)], 0.0, "train"),
        ([("train", 100, 0.8), ("prune-1", 50, 0.9), ("prune-2", 50, 0.95)], 0.1, "prune-2"),
    ],
)
def test_the_smallest_set_within_the_slack_of_the_best_is_chosen(candidates, slack, chosen):
    assert choose([candidate(*each) for each in candidates], slack=slack).phase == chosen


def test_of_equally_small_and_accurate_sets_the_lower_loss_wins():
    candidates = [candidate("prune-1", 50, 0.9, 0.4), candidate("prune-2", 50, 0.9, 0.3)]
    assert choose(candidates, slack=0.0).phase == "prune-2"


def test_a_candidate_that_was_stopped_is_not_chosen():
    stopped = candidate("prune-1", 10, 0.99, finished=False)
    assert choose([candidate("train", 100, 0.9), stopped], slack=0.0).phase == "train"


def test_candidates_within_the_slack_go_on_by_size_and_the_others_by_accuracy():
    names = {"a": (90, 0.90), "b": (50, 0.89), "c": (20, 0.70), "d": (10, 0.80)}
    entered = [candidate(name, *each) for name, each in names.items()]
    assert [each.phase for each in rank(entered, slack=0.05, reference=0.0)] == ["b", "a", "d", "c"]
    # What the unpruned prompts reached by then counts, too.
    assert [each.phase for each in rank(entered, slack=0.05, reference=0.945)] == ["a", "b", "d", "c"]


def epochs_in_all(rungs: list[Rung], *, candidates: int) -> int:
    """The epochs that a search trains, by hand: everyone runs to the first rung, its survivors to the second, ..."""
    total, reached, running = 0, 0, candidates
    for rung in rungs:
        total += running * (rung.epochs - reached)
        reached, running = rung.epochs, rung.survivors
    return total


def test_halving_trains_half_of_the_candidates_from_a_quarter_and_a_quarter_of_them_from_a_half():
    rungs = rungs_of("halving", candidates=8, epochs=100)
    assert rungs == [Rung(epochs=25, survivors=4), Rung(epochs=50, survivors=2), Rung(epochs=100, survivors=2)]
    assert epochs_in_all(rungs, candidates=8) == 8 * 25 + 4 * 25 + 2 * 50
    assert rungs_of("full", candidates=8, epochs=100) == [Rung(epochs=100, survivors=8)]


@pytest.mark.parametrize("candidates", [4, 5, 6, 7, 8, 9])
@pytest.mark.parametrize("epochs", [4, 8, 100])
def test_halving_costs_at_most_half_as_many_trainings_as_candidates(candidates, epochs):
    rungs = rungs_of("halving", candidates=candidates, epochs=epochs)
    assert epochs_in_all(rungs, candidates=candidates) <= candidates / 2 * epochs


@pytest.mark.parametrize("candidates", [1, 2, 3, 6])
@pytest.mark.parametrize("epochs", [1, 2, 3, 5, 7])
def test_a_search_always_trains_one_candidate_to_the_end(candidates, epochs):
    rungs = rungs_of("halving", candidates=candidates, epochs=epochs)
    assert rungs[-1].epochs == epochs
    assert all(rung.survivors >= 1 for rung in rungs)
    assert [rung.epochs for rung in rungs] == sorted({rung.epochs for rung in rungs})
    assert epochs_in_all(rungs, candidates=candidates) <= candidates * epochs


def test_the_report_lists_every_candidate_and_what_the_chosen_one_keeps():
    vit = make_vit()
    whole, smaller = (make_model(vit, make_method(vit, tokens, 1)).float() for tokens in (2, 1))
    everything, chosen = candidate("train", 288, 0.5, model=whole), candidate("prune-1", 192, 0.25, model=smaller)
    scores = Scores(
        tokens=[torch.tensor([1.0, 2.0])] * DEPTH,
        kv_tokens=[torch.tensor([3.0])] * DEPTH,
        segments=[torch.ones(2, 16)] * DEPTH,
        hidden=torch.ones(0),
    )
    fields = report_of([everything, chosen], chosen, scores, scope="layer", mode="remove").to_json()
    assert json.loads(json.dumps(fields)) == fields
    assert [row["phase"] for row in fields["candidates"]] == ["train", "prune-1"]
    assert [row["val_accuracy"] for row in fields["candidates"]] == [0.5, 0.25]
    assert (fields["before"]["parameters"], fields["after"]["parameters"]) == (288, 192)
    assert fields["before"]["bytes"] == 4 * DEPTH * (2 + 1) * WIDTH
    assert fields["after"]["bytes"] == 4 * DEPTH * (1 + 1) * WIDTH
    # A column costs two products with each query; the last block's only query is the class token's.
    assert fields["before"]["macs"] - fields["after"]["macs"] == 2 * WIDTH * ((DEPTH - 1) * TOKENS + 1)
    assert fields["chosen"] == "prune-1"
    assert fields["token_scores"] == [[1.0, 2.0]] * DEPTH
    assert fields["kv_scores"] == [[3.0]] * DEPTH
    assert fields["kept"]["tokens"] == [[0]] * DEPTH
    head, backbone = WIDTH * CLASSES + CLASSES, sum(parameter.numel() for parameter in vit.parameters())
    assert fields["after"]["tuned_percent"] == pytest.approx(
        100 * (smaller.method.summary()["parameters"] + head) / (backbone + head)
    )


def make_vapt(tokens: int, hidden: int) -> tuple[Any, VAPT]:
    vit = make_vit()
    return vit, VAPT(dimensions_of(vit), Kept.everything(DEPTH, tokens, 0, hidden))


def test_a_generator_costs_its_mixing_its_projector_and_its_projections():
    def macs(tokens: int, hidden: int) -> int:
        vit, method = make_vapt(tokens, hidden)
        return count_macs(make_model(vit, method)) or 0

    patches = TOKENS - 1
    columns = 2 * WIDTH * ((DEPTH - 1) * TOKENS + 1)
    generators = (DEPTH - 1) * (patches * WIDTH + 2 * 5 * WIDTH + 2 * WIDTH**2)
    assert macs(4, 5) - macs(3, 5) == columns + generators
    assert macs(4, 6) - macs(4, 5) == (DEPTH - 1) * 4 * 2 * WIDTH


def counted(model: PromptedViT) -> int:
    """Count the second image of a batch of two: what does not depend on the images drops out."""
    totals = []
    for pixels in (random_pixels(1, dtype=torch.float32), random_pixels(2, dtype=torch.float32)):
        with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel([SDPBackend.MATH]):
            model.eval()(pixels)
        totals.append(counter.get_total_flops() // 2)
    return totals[1] - totals[0]


@pytest.mark.parametrize("pooling", ["token", "avg"])
@pytest.mark.parametrize("method", ["e2vpt", "vapt", "linear"])
def test_what_is_counted_on_paper_is_what_torch_counts(method, pooling):
    vit = make_vit(global_pool=pooling)
    methods: dict[str, Any] = {
        "e2vpt": lambda: make_method(vit, 5, 3),
        "vapt": lambda: VAPT(dimensions_of(vit), Kept.everything(DEPTH, 5, 0, 6)),
        "linear": NoPrompts,
    }
    model = PromptedViT(vit, methods[method](), CLASSES)
    assert count_macs(model) == counted(model)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prune_mode": "zero"}, r"--prune-mode zero: .*made from the image.*use --prune-mode remove"),
        ({"keep_segments": "0.75"}, r"--keep-segments: .*no segments"),
        ({"prune_kv": True}, r"--prune-kv: method 'vapt' has no key/value prompts"),
    ],
)
def test_what_adaptive_prompts_do_not_have_cannot_be_pruned(values, message):
    with pytest.raises(SpecError, match=message):
        shares_to_try(TrainSettings(data="digits", method="vapt", **values), make_vapt(4, 6)[1])


def test_adaptive_prompts_are_tried_with_whole_segments():
    settings = TrainSettings(data="digits", method="vapt", keep="0.5,0.25", keep_hidden=0.5)
    shares = shares_to_try(settings, make_vapt(4, 6)[1])
    assert shares == [Shares(tokens=0.5, hidden=0.5), Shares(tokens=0.25, hidden=0.5)]
    with pytest.raises(SpecError, match="--keep-hidden: method 'e2vpt' has no hidden units"):
        shares_to_try(TrainSettings(data="digits", keep_hidden=0.5), make_method(make_vit(), 2, 1))
