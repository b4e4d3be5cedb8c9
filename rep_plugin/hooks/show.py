"""Pictures into whatever the training's visualizer writes to: local files, TensorBoard, others."""

from collections.abc import Callable, Sequence

from matplotlib.figure import Figure
from mmengine.dist import is_main_process
from mmengine.runner import Runner

from rep_plugin.hooks.live import main_figure
from rep_plugin.pictures import accuracy_figure, to_array


def show(runner: Runner, name: str, draw: Callable[[], Figure]) -> None:
    """Draw a figure, in the main process alone, and hand it to the visualizer under the number of the iteration."""
    if is_main_process():
        runner.visualizer.add_image(name, to_array(draw()), runner.iter)


def show_rounds(runner: Runner, rounds: Sequence[dict]) -> None:
    """Draw validation over the share of channels removed, round by round; nothing where nothing was validated."""
    name = main_figure(rounds[0]["before"]) if rounds else None
    if name is None:
        return
    removed = [1 - entry["channels_after"] / rounds[0]["channels_before"] for entry in rounds]
    curves = {
        label: {share: entry[when][name] for share, entry in zip(removed, rounds) if entry[when]}
        for label, when in (("after removal", "after"), ("fine-tuned", "tuned"))
    }
    curves = {label: points for label, points in curves.items() if points}
    dense = rounds[0]["before"][name]
    show(runner, "accuracy_over_fraction", lambda: accuracy_figure(curves, name, "rounds of pruning", dense))
