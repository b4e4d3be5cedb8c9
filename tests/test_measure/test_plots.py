"""Pictures show the numbers they are given."""

import io

import cv2
import numpy as np
import pytest

from rep_plugin.measure.plots import (
    RED,
    accuracy_figure,
    draw_widths,
    gammas_figure,
    layers_figure,
    to_array,
    widths_figure,
)


def test_histogram_counts_all_gammas_and_marks_those_near_zero():
    gammas = np.concatenate([np.full(30, 1e-4), -np.full(20, 1e-4), np.linspace(0.5, 1.0, 50)])
    left, right = gammas_figure(gammas, "after 3 epochs").axes
    heights = [bar.get_height() for bar in left.patches]
    assert len(heights) == 128 and heights[0] == 50 and sum(heights) == 100
    reds = [
        bar
        for bar in left.patches
        if np.allclose(bar.get_facecolor()[:3], [int(RED[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    ]
    assert reds == [left.patches[0]]
    assert "50 of 100, 50.0%" in left.get_legend().get_texts()[0].get_text()
    curve = right.get_lines()[0]
    assert curve.get_ydata()[-1] == 1 and (np.diff(curve.get_xdata()) >= 0).all()
    cuts = {line.get_ydata()[0]: line.get_xdata()[0] for line in right.get_lines()[1:]}
    assert cuts[0.4] == 1e-4 and cuts[0.8] == pytest.approx(0.5 + 30 / 49 * 0.5)
    assert gammas_figure([0.0, 0.0]).axes[0].patches[0].get_height() == 2  # all dead
    with pytest.raises(ValueError, match="got no gammas to draw"):
        gammas_figure([])


def test_accuracy_has_a_curve_for_each_label_in_the_order_of_shares():
    curves = {"after removal": {0.5: 60.0, 0.1: 90.0}, "fine-tuned": {0.1: 91.0}}
    (axes,) = accuracy_figure(curves, "top-1", dense=92.0).axes
    first, second, dense = axes.get_lines()
    assert list(first.get_xdata()) == [10, 50] and list(first.get_ydata()) == [90, 60]
    assert list(second.get_ydata()) == [91] and dense.get_ydata()[0] == 92
    with pytest.raises(ValueError, match="got no metrics to draw"):
        accuracy_figure({"a": {}})


def test_layers_stand_beside_their_spread_before_and_after():
    gains, spreads = {"a": 2.0, "b": -1.0, "c": 0.5}, {"a": (30.0, 5.0), "b": (None, 4.0), "c": (7.0, 9.0)}
    left, right = layers_figure(gains, spreads).axes
    assert [bar.get_width() for bar in left.patches] == [2.0, -1.0, 0.5]
    assert [text.get_text() for text in left.get_yticklabels()] == ["a", "b", "c"]
    assert [bar.get_width() for bar in right.patches] == [30.0, 7.0, 5.0, 4.0, 9.0]
    assert [bar.get_y() + bar.get_height() / 2 for bar in right.patches[:2]] == pytest.approx([0, 2])
    with pytest.raises(ValueError, match="got no layers to draw"):
        layers_figure({}, {})


def test_array_is_the_picture_that_is_written():
    widths = {"conv1": (64, 16), "conv2": (128, 128)}
    file = io.BytesIO()
    draw_widths(widths, file, "title", ["conv2"])
    written = cv2.imdecode(np.frombuffer(file.getvalue(), np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    drawn = to_array(widths_figure(widths, "title", ["conv2"]))
    assert drawn.dtype == np.uint8 and drawn.shape == written.shape and (drawn == written).mean() > 0.99
    assert drawn.std() > 5
