import pytest
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from vpdeploy_train.point_labels import label_points

# Few, a row of equal heights as candidates of equal accuracy make it, and many in one corner.
POINTS = {
    "two": [(1.0, 1.0), (1.02, 1.0)],
    "a row of six": [(1.0 + step / 50, 0.9) for step in range(6)] + [(3.0, 0.9)],
    "twelve in a corner": [(1.0 + step / 100, 0.9 + step % 3 / 1000) for step in range(12)] + [(10.0, 1.0)],
}


@pytest.mark.parametrize("name", POINTS)
def test_no_label_covers_another_or_a_point(name):
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*POINTS[name], strict=True), "o", ms=7)
    axes.margins(0.1, 0.25)
    label_points(axes, {point: f"{number} %\nto epoch 3" for number, point in enumerate(POINTS[name])})
    figure.draw_without_rendering()
    labels = [each for each in axes.texts if isinstance(each, Annotation) and each.get_text()]
    boxes = [label.get_window_extent() for label in labels]
    assert len(boxes) == len(POINTS[name])
    assert not any(one.overlaps(other) for at, one in enumerate(boxes) for other in boxes[at + 1 :])
    spots = [axes.transData.transform(point) for point in POINTS[name]]
    assert not any(box.contains(*spot) for box in boxes for spot in spots)
    area = axes.get_window_extent()
    assert all(area.contains(box.x0, box.y0) and area.contains(box.x1, box.y1) for box in boxes)
