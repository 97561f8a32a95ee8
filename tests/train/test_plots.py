from pathlib import Path

import pytest
from matplotlib.figure import Figure

import vpdeploy_train.plots as plots
from vpdeploy_train.state import EpochRow


@pytest.mark.parametrize("phases", [1, 7, 13])
def test_the_legend_of_many_phases_covers_no_curve_and_no_two_have_one_colour(monkeypatch, phases):
    figures: list[Figure] = []
    monkeypatch.setattr(plots, "save_picture", lambda figure, path: figures.append(figure))
    history = [
        EpochRow(
            phase="train" if number == 0 else f"prune-{number}",
            epoch=epoch,
            lr=0.1,
            train_loss=1.0,
            train_accuracy=0.5,
            val_loss=1.0,
            val_accuracy=0.5,
            images_per_second=1.0,
        )
        for number in range(phases)
        for epoch in (1, 2, 3)
    ]
    plots.plot_curves(history, Path("curves.png"))
    [figure] = figures
    figure.draw_without_rendering()
    [legend] = figure.legends
    assert len(legend.get_texts()) == phases
    assert len({line.get_color() for line in legend.get_lines()}) == phases
    assert not any(legend.get_window_extent().overlaps(axes.get_window_extent()) for axes in figure.axes)
