"""The program that makes the embedded backbone: its parts on toy pictures, without its data packages."""

from __future__ import annotations

import gzip
import math
import pickle
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tools.embedded_backbone import distillation, drawings, packages, student, views
from tools.embedded_backbone.distillation import Schedule
from tools.embedded_backbone.gallery import Gallery
from vpdeploy_train.embedded import WEIGHTS, vit_mini_patch8_64

SCHEDULE = Schedule(views=16, epochs=4, cool_down=2, batch=8, peak_rate=2e-3, decay=0.05, seed=0)
NEEDED = ("--work", "w", "--python", "p", "--emoji", "e", "--photos", "f")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    """Run the program and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["embedded_backbone", *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("tools.embedded_backbone", run_name="__main__")
    return ended.value.code


@pytest.fixture
def gallery() -> Gallery:
    rng = np.random.default_rng(0)

    def pictures(mode: str, side: int) -> list[Image.Image]:
        shape = (side, side, len(mode))
        return [Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8), mode) for _ in range(2)]

    return Gallery(
        cutouts={name: pictures("RGBA", 40) for name in ("emoji", "clipart")},
        wholes={
            **{name: pictures("RGB", 28) for name in ("fashion", "animals")},
            **{name: pictures("RGB", 240) for name in ("photos", "satellite")},
        },
    )


def test_help_tells_the_stages_and_the_options(monkeypatch, capsys):
    assert run(monkeypatch, "--help") == 0
    shown = capsys.readouterr().out
    for word in ("features", "distil", "write", "evaluate", "--work", "--epochs", "docs/embedded_backbone.md"):
        assert word in shown


def test_views_that_fill_no_whole_chunk_are_refused(monkeypatch, capsys):
    assert run(monkeypatch, *NEEDED, "--views", "2049") == 2
    assert "--views: expected a multiple of 2048, found 2049" in capsys.readouterr().err


def test_a_view_depends_on_its_own_seed_and_number_alone(gallery, monkeypatch):
    monkeypatch.setattr(views, "CHUNK", 24)
    large, small = views.draw_views(gallery, 3, 0)
    assert (large.shape, small.shape) == ((24, 112, 112, 3), (24, 64, 64, 3))
    later, _ = views.draw_views(gallery, 3, 16)
    np.testing.assert_array_equal(later[:8], large[16:])
    other, _ = views.draw_views(gallery, 4, 0)
    assert not np.array_equal(other, large)


def test_the_sources_of_views_add_up_to_all():
    assert math.isclose(sum(views.SHARES.values()), 1)


def test_a_pickled_array_is_read_and_pickled_code_is_refused(tmp_path):
    folder = tmp_path / "animal_mnist" / "data" / "Animal_MNIST"
    folder.mkdir(parents=True)
    images = np.zeros((3, 28, 28), np.uint8)
    images[1] = 1  # the third is the first once more
    labels = np.array([4, 5, 4])
    for part, array in (("data", images), ("label", labels)):
        (folder / f"animal_{part}_version_3.gz").write_bytes(gzip.compress(pickle.dumps(array)))
    found, of_class = packages.read_animals(tmp_path)
    np.testing.assert_array_equal(found, images[:2])
    np.testing.assert_array_equal(of_class, [4, 5])
    (folder / "animal_data_version_3.gz").write_bytes(gzip.compress(pickle.dumps(Path)))
    with pytest.raises(pickle.UnpicklingError, match=r"expected only numpy arrays, found pathlib.*do not load"):
        packages.read_animals(tmp_path)


@pytest.fixture
def pupil(monkeypatch) -> student.Student:
    monkeypatch.setattr(student, "set_fused_attn", lambda enable: None)  # is of the whole process
    torch.manual_seed(0)
    return student.Student()


def test_the_student_comes_nearer_to_its_targets(pupil):
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (16, 64, 64, 3), dtype=np.uint8)
    data = small, torch.randn(16, 384), torch.randn(16, 64, 128).half()
    optimizer = distillation.build_optimizer(pupil, SCHEDULE)
    losses = [
        distillation.train_epoch(pupil.measure_loss, pupil, optimizer, data, SCHEDULE, epoch) for epoch in range(4)
    ]
    assert losses[-1] < losses[0]


def test_the_distance_is_none_from_the_target_and_more_from_its_opposite():
    target = torch.tensor([[3.0, 4.0]])
    assert float(student.measure_distance(target, target)) == pytest.approx(0, abs=1e-6)
    # Smooth L1 of differences 6 and 8 is 5.5 and 7.5, on average 6.5; the cosine is -1.
    assert float(student.measure_distance(-target, target)) == pytest.approx(6.5 + 2)


def test_images_and_their_patch_tokens_are_mirrored_alike():
    images = torch.arange(64.0).expand(2, 3, 64, 64)
    patches = torch.arange(8.0).repeat(8)[None, :, None].expand(2, 64, 1)  # the column of each patch
    turned, tokens = distillation.mirror(images, patches, torch.tensor([True, False]))
    assert turned[0, 0, 0].tolist() == list(range(63, -1, -1))
    assert tokens[0, :8, 0].tolist() == list(range(7, -1, -1))
    assert torch.equal(turned[1], images[1])
    assert torch.equal(tokens[1], patches[1])


@pytest.mark.parametrize(
    ("epoch", "rate"),
    [
        (0.0, 0.0),
        # A quarter of the cosine's six epochs, warmed up: (1 + cos(π/4)) / 2.
        (1.5, (1 + math.sqrt(0.5)) / 2),
        # The middle of the cosine, half of the cool-down still to go.
        (3.0, 0.5 * 0.5),
        (4.0, 0.0),
    ],
)
def test_the_rate_warms_up_follows_a_cosine_and_cools_down_to_nothing(pupil, epoch, rate):
    optimizer = distillation.build_optimizer(pupil, SCHEDULE)
    distillation.set_rate(optimizer, SCHEDULE, epoch)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([rate * 2e-3] * 2)


def test_the_written_file_is_the_student_in_float16(pupil, tmp_path):
    student.write_weights(pupil.backbone, tmp_path / "new" / "w.safetensors")
    for name, value in student.read_weights(tmp_path / "new" / "w.safetensors").state_dict().items():
        assert torch.equal(value, pupil.backbone.state_dict()[name].half().float())


def test_the_shipped_file_is_one_that_the_program_reads():
    assert student.read_weights(WEIGHTS).state_dict().keys() == vit_mini_patch8_64().state_dict().keys()
    assert {value.dtype for value in load_file(WEIGHTS).values()} == {torch.float16}


def drawn(picture: Image.Image) -> np.ndarray:
    """Return where a picture differs from its ground, the colour that most pixels have."""
    pixels = np.asarray(picture).reshape(-1, 3)
    colours, counts = np.unique(pixels, axis=0, return_counts=True)
    return (pixels != colours[counts.argmax()]).any(1).reshape(picture.size)


@pytest.mark.parametrize("seed", range(5))
def test_the_label_of_a_drawn_place_is_the_cell_of_its_middle(seed):
    picture, cell = drawings.draw_location(np.random.default_rng(seed))
    rows, columns = np.nonzero(drawn(picture))
    # Shapes may reach over an edge of the picture, which shifts what is seen of them towards its middle.
    middle = ((columns.min() + columns.max()) / 2, (rows.min() + rows.max()) / 2)
    if min(rows.min(), columns.min()) > 0 and max(rows.max(), columns.max()) < 223:
        assert tuple(int(part // 56) for part in middle) == divmod(cell, 4)
    assert len(rows) > 0


@pytest.mark.parametrize("seed", range(5))
def test_the_label_of_drawn_discs_is_their_number_less_one(seed):
    picture, label = drawings.draw_count(np.random.default_rng(seed))
    cells = drawn(picture).reshape(4, 56, 4, 56).sum((1, 3))
    # A disc fills at least a tenth of its cell, what reaches over from a neighbour far less.
    assert (cells > 56 * 56 / 10).sum() == label + 1
