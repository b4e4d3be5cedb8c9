"""Plots that hooks hand to the visualizer: local files and TensorBoard, from the main process alone."""

import cv2
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.test_openmmlab.test_hooks.tiny import STEPS, config, run

SPARSITY = dict(type="rep_plugin.SparsityHook", strength=0.01, end=3, histogram_interval=2)
PRUNE = dict(type="rep_plugin.PruneHook", prune_fraction=0.5, rounds=2, begin=1, interval=2)
BACKENDS = [dict(type="LocalVisBackend"), dict(type="TensorboardVisBackend")]
VISUALIZER = dict(visualizer=dict(type="UniversalVisualizer", vis_backends=BACKENDS))
EXPECTED = {
    "gammas": [2 * STEPS, 3 * STEPS, 4 * STEPS],  # every second epoch, the end of the pull, the end
    "widths": [STEPS, 3 * STEPS],
    "accuracy_over_fraction": [3 * STEPS, 4 * STEPS],  # as soon as a round is fine-tuned
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plots")
    run(config(folder, SPARSITY, PRUNE, **VISUALIZER))
    return folder


def test_local_files(folder):
    files = {path.name: cv2.imread(str(path)) for path in folder.glob("*/vis_data/vis_image/*.png")}
    assert set(files) == {f"{name}_{step}.png" for name, steps in EXPECTED.items() for step in steps}
    assert all(min(plot.shape[:2]) > 250 and plot.std() > 5 for plot in files.values())


def test_tensorboard(folder):
    (path,) = folder.glob("*/vis_data/events.*")
    events = EventAccumulator(str(path), size_guidance={"images": 0}).Reload()
    found = {tag: [event.step for event in events.Images(tag)] for tag in events.Tags()["images"]}
    assert found == EXPECTED


def test_other_processes_draw_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("rep_plugin.openmmlab.hooks.runner_utils.is_main_process", lambda: False)
    run(config(tmp_path, SPARSITY, dict(type="rep_plugin.PruneHook", prune_fraction=0.5), **VISUALIZER))
    assert not list(tmp_path.glob("*/vis_data/vis_image/*"))


def test_pruning_after_training_and_soft_pruning_draw_too(tmp_path):
    """And a histogram is not drawn where none is wanted."""
    run(
        config(
            tmp_path, SPARSITY | dict(histogram_interval=0), dict(type="rep_plugin.SoftPruneHook", prune_fraction=0.4)
        )
    )
    names = {path.name for path in tmp_path.glob("*/vis_data/vis_image/*.png")}
    assert names == {f"widths_{4 * STEPS}.png", f"accuracy_over_fraction_{4 * STEPS}.png"}
