from collections import Counter

import numpy as np
import pytest
from sklearn.datasets import load_digits

from vpdeploy.errors import SpecError
from vpdeploy_train.data import resolve_data

SPLITS = ("train", "val", "test")
DIGIT_TASKS = {
    "digits": {digit: str(digit) for digit in range(10)},
    "digits:parity": {digit: "odd" if digit in (1, 3, 5, 7, 9) else "even" for digit in range(10)},
    "digits:loops": {
        digit: "2 loops" if digit == 8 else "1 loop" if digit in (0, 4, 6, 9) else "0 loops" for digit in range(10)
    },
}
SHAPE_TASKS = {"shapes:count": 6, "shapes:location": 9, "shapes:orientation": 8}


def pixels_of(source, split):
    return [example.source.tobytes() for example in source.split(split)]


@pytest.mark.parametrize("spec", DIGIT_TASKS)
def test_digits_carry_the_right_labels(spec):
    bunch = load_digits()
    # 0 to 16 becomes 0 to 255; the images are pairwise different, so their pixels identify them.
    digits = {
        np.rint(image * 255 / 16).astype(np.uint8).tobytes(): int(digit)
        for image, digit in zip(bunch.images, bunch.target, strict=True)
    }
    source = resolve_data(spec, seed=0)
    examples = [example for split in SPLITS for example in source.split(split)]
    assert len(examples) == len(digits) == 1797
    for example in examples:
        digit = digits[np.ascontiguousarray(example.source[..., 0]).tobytes()]
        assert source.labels[example.label] == DIGIT_TASKS[spec][digit]


def test_the_splits_of_digits_are_the_same_for_every_task_and_seed():
    base = resolve_data("digits", seed=0)
    for spec in DIGIT_TASKS:
        other = resolve_data(spec, seed=7, val_fraction=0.5)
        for split in SPLITS:
            assert pixels_of(base, split) == pixels_of(other, split)


def test_the_splits_of_digits_are_disjoint_and_stratified():
    source = resolve_data("digits", seed=0)
    everything = [pixels for split in SPLITS for pixels in pixels_of(source, split)]
    assert len(set(everything)) == 1797
    for split, share in {"train": 0.6, "val": 0.2, "test": 0.2}.items():
        counts = Counter(example.label for example in source.split(split))
        assert len(counts) == 10
        assert all(abs(count - share * 179.7) < 6 for count in counts.values())


@pytest.mark.parametrize("spec", ["digits:", "digits:primes", "shapes:", "shapes:colour", "shapes"])
def test_an_unknown_task_is_refused_with_those_there_are(spec):
    with pytest.raises(SpecError, match=f"unknown task '{spec}'; expected one of: {spec.split(':')[0]}"):
        resolve_data(spec, seed=0)


@pytest.mark.parametrize("spec", SHAPE_TASKS)
def test_shapes_are_balanced_disjoint_and_the_same_for_every_seed(spec):
    source = resolve_data(spec, seed=0)
    again = resolve_data(spec, seed=1)
    assert [len(source.split(split)) for split in SPLITS] == [1000, 300, 500]
    assert len(source.labels) == SHAPE_TASKS[spec]
    everything = [pixels for split in SPLITS for pixels in pixels_of(source, split)]
    assert len(set(everything)) == 1800
    assert source.augmentation == "none"
    for split in SPLITS:
        counts = Counter(example.label for example in source.split(split))
        assert max(counts.values()) - min(counts.values()) <= 1
        assert pixels_of(source, split) == pixels_of(again, split)
    pixels = source.train[0].source
    assert pixels.shape == (64, 64, 3)
    assert pixels.dtype == np.uint8
    assert not pixels.flags.writeable


class Recorder:
    """Stands in for the canvas and keeps what would be drawn."""

    def __init__(self, seed):
        self.generator = np.random.default_rng(seed)
        self.drawn = []

    def draw(self, outline, centre, radius, angle):
        self.drawn.append((centre, radius, angle))

    def arrow_outline(self):
        return [(1.0, 0.0), (-1.0, 0.5), (-1.0, -0.5)]


@pytest.mark.parametrize("seed", range(5))
def test_what_is_drawn_is_what_the_label_says(seed):
    from vpdeploy_train.data.shapes import TASKS

    for index, label in enumerate(TASKS["shapes:count"].labels):
        canvas = Recorder(seed)
        TASKS["shapes:count"].draw(canvas, index)
        assert len(canvas.drawn) == int(label)
        for number, ((x, y), radius, _) in enumerate(canvas.drawn):
            assert all(np.hypot(x - a, y - b) > radius + r for (a, b), r, _ in canvas.drawn[:number])
    for index, label in enumerate(TASKS["shapes:location"].labels):
        canvas = Recorder(seed)
        TASKS["shapes:location"].draw(canvas, index)
        [((x, y), _, _)] = canvas.drawn
        vertical = "top" if y < 64 / 3 else "bottom" if y > 128 / 3 else ""
        horizontal = "left" if x < 64 / 3 else "right" if x > 128 / 3 else ""
        assert label == ("-".join(filter(None, [vertical, horizontal])) or "centre")
    # On screen y grows downwards: an arrow to the north points along -y.
    steps = {"north": (0, -1), "south": (0, 1), "west": (-1, 0), "east": (1, 0)}
    for index, label in enumerate(TASKS["shapes:orientation"].labels):
        canvas = Recorder(seed)
        TASKS["shapes:orientation"].draw(canvas, index)
        [(_, _, angle)] = canvas.drawn
        wanted = np.sum([steps[part] for part in label.split("-")], axis=0)
        cosine = np.dot(wanted / np.linalg.norm(wanted), (np.cos(angle), np.sin(angle)))
        assert cosine > np.cos(np.radians(12.01))


def test_a_drawn_shape_faces_the_angle_it_was_given():
    from vpdeploy_train.data.canvas import Canvas

    outline = [(1.0, 0.0), (-0.2, 0.2), (-0.2, -0.2)]
    plain, drawn = Canvas(np.random.default_rng(3)), Canvas(np.random.default_rng(3))
    drawn.draw(outline, (32, 32), 20, np.pi / 2)
    layer = np.asarray(drawn._opacity)
    rows = np.flatnonzero(layer.any(axis=1))
    assert abs(rows.max() - 4 * 52) <= 4  # the tip, 20 pixels below the centre, on the 4× layer
    assert abs(rows.min() - 4 * 28) <= 4
    assert np.abs(plain.to_pixels().astype(int) - drawn.to_pixels().astype(int))[45, 32].max() > 40
