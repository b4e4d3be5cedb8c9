"""CentripetalHook: train the filters of a cluster to be equal, and make them one at the end, without any loss."""

from collections.abc import Mapping, Sequence
from typing import Annotated

from mmengine.runner import Runner
from torch import nn

from rep_plugin.arguments import Count, Fraction, In, Name, NotNegative, OneOf, Seed, Share, checked
from rep_plugin.errors import HookError
from rep_plugin.measure.copies import copy_model
from rep_plugin.openmmlab.artefacts import check_pruned_form
from rep_plugin.openmmlab.hooks.base_pruning_hook import PruningHook, budget_of, from_main_process
from rep_plugin.openmmlab.hooks.runner_utils import (
    as_hook_error,
    evaluate,
    final_model,
    images_of,
    merge_loss_warning,
    optimizers_of,
    plain_model,
    rehearsal,
    shape_of_one,
)
from rep_plugin.openmmlab.hooks.schedule import Schedule
from rep_plugin.pruning.methods.centripetal import Centripetal, cluster_distances, merge_clusters_, snap_clusters_
from rep_plugin.pruning.methods.clusters import METHODS, Clusters, plan_clusters
from rep_plugin.pruning.planning.options import Cost, Overrides, PruneOptions, Widths
from rep_plugin.registry import HOOKS


@checked
@HOOKS.register_module()
class CentripetalHook(PruningHook):
    """Centripetal SGD (Ding et al., CVPR 2019), for coupled layers as well: they share their clusters.

    After ``begin`` epochs the channels of every group of coupled layers are put in clusters, each group giving an equal
    share. From then on every real step draws the filters of a cluster to their mean, see
    :class:`rep_plugin.pruning.methods.centripetal.Centripetal`. Running statistics follow on their own, by their momentum.

    After training, on a copy (of the EMA weights, where there are), the members of each cluster are set to their mean
    and made one channel, which the next layers read by the sum of their columns: proven equal, and written as
    ``pruned.pth pruned.py``. There is no fine-tuning. Validation is run before both and after; more than 0.1 point lost
    is a warning. Metrics and the distances, max and relative by group, are in ``pruned.rounds.json``.

    Checkpoints hold the clusters, so that a resumed run goes on exactly. A first merge, on a copy, is proven before the
    first step.

    Args:
        prune_fraction: Share of the channels that is removed, in (0, 1); or
        params: parameters that may remain, a share as a float or a whole number; or
        macs: multiply-adds, likewise; or
        widths: {layer: number of its clusters}.
        clusters: ``kmeans`` of the kernels, or ``even``.
        strength: The paper's epsilon. A short schedule may need a larger one: ``train/centripetal_distance`` in the log
            has to come down to 1e-3 or so.
        begin: Epochs that are over when it begins, fractions too.
        by_epoch: False: ``begin`` counts iterations.
        min_channels: As :func:`rep_plugin.plan_pruning` has it.
        max_prune_fraction: As there.
        round_to: As there.
        overrides: As there.
        ignore: As there.
        seed: Of k-means.
        out_dir: Folder of the files; default: the work directory.

    Raises:
        ArgumentError: An argument is out of its range.
        HookError: The model cannot be merged so.

    Example:
        >>> custom_hooks = [dict(type="rep_plugin.CentripetalHook", macs=0.5, strength=0.05)]
    """

    meta_key = "rep_centripetal"

    def __init__(
        self,
        prune_fraction: Share | None = None,
        *,
        params: Cost | None = None,
        macs: Cost | None = None,
        widths: Widths | None = None,
        clusters: Annotated[str, OneOf(METHODS)] = "kmeans",
        strength: Annotated[float, In("(0, 1000]")] = 3e-3,
        begin: NotNegative = 0,
        by_epoch: bool = True,
        min_channels: Count | None = None,
        max_prune_fraction: Fraction | None = None,
        round_to: Count | None = None,
        overrides: Overrides | None = None,
        ignore: Sequence[str] = (),
        seed: Seed = 0,
        out_dir: Name | None = None,
    ):
        super().__init__(out_dir)
        self.budget = budget_of(prune_fraction, params, macs, widths=widths) or widths
        self.strength, self.method, self.schedule = strength, clusters, Schedule(begin, by_epoch=by_epoch)
        self.options = PruneOptions(
            min_channels=min_channels,
            max_prune_fraction=max_prune_fraction,
            round_to=round_to,
            overrides=overrides,
            ignore=ignore,
            seed=seed,
        )
        self.clusters: Clusters | None = None
        self.pull: Centripetal | None = None
        self._start = 0

    def state(self) -> str | None:
        return self.clusters.to_json() if self.clusters else None

    def load_state(self, state: str) -> None:
        self.clusters = Clusters.from_json(state)

    def before_train(self, runner: Runner) -> None:
        super().before_train(runner)
        self._start = self.schedule.in_iterations(runner, "CentripetalHook").begin
        if self._start >= runner.max_iters:
            limit, unit = self.schedule.length(runner, "CentripetalHook")
            raise HookError(f"CentripetalHook.begin (={self.schedule.begin}) must be < the training's {limit} {unit}")
        if other := next((h for h in runner.hooks if isinstance(h, PruningHook) and h is not self), None):
            raise HookError(f"CentripetalHook and {type(other).__name__} cannot both prune one training: keep one")
        planned = self._plan(runner)
        if self.clusters is not None and self.clusters.plan.why != planned.plan.why:
            raise HookError(
                f"the checkpoint's clusters were made for {self.clusters.plan.why!r}, the config asks for "
                f"{planned.plan.why!r}"
            )
        self._rehearse(runner, self.clusters or planned)
        self._begin_if_due(runner)

    def _rehearse(self, runner: Runner, clusters: Clusters) -> None:
        """A merge that cannot be proven shall be known before the training, not after it."""
        model = copy_model(plain_model(runner))
        model.eval()
        images = images_of(runner, 2)
        with rehearsal("CentripetalHook"):
            snap_clusters_(model, clusters)
            merge_clusters_(model, clusters, example_input=images)
            check_pruned_form(model, runner.cfg, clusters.plan, images)

    def _plan(self, runner: Runner) -> Clusters:
        with as_hook_error("CentripetalHook"):
            clusters = plan_clusters(plain_model(runner), shape_of_one(runner), self.budget, self.options, self.method)
            return from_main_process(clusters)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        self._begin_if_due(runner)

    def _begin_if_due(self, runner: Runner) -> None:
        if self.pull is not None or runner.iter < self._start:
            return
        self.clusters = self.clusters or self._plan(runner)
        model, plan = plain_model(runner), self.clusters.plan
        with as_hook_error("CentripetalHook"):
            self.pull = Centripetal(model, self.clusters, self.strength)
            self.pull.attach(optimizers_of(runner))
        runner.logger.info(
            f"CentripetalHook draws {plan.units[0]} channels into {plan.units[0] - plan.units[1]} ({plan.why}): parameters "
            f"{plan.params_before:,} -> {plan.params_after:,}, multiply-adds {plan.macs_before:,} -> {plan.macs_after:,}"
        )

    def after_train_epoch(self, runner: Runner) -> None:
        if self.pull is not None:
            name, (_, relative) = _farthest(cluster_distances(plain_model(runner), self.pull.members))
            runner.message_hub.update_scalar("train/centripetal_distance", relative)
            runner.logger.info(f"CentripetalHook: filters are {relative:.2e} from equal, relative, at most ({name})")

    def after_train(self, runner: Runner) -> None:
        if self.pull is not None:
            self.pull.detach()
        if self.clusters is None:
            runner.logger.warning("CentripetalHook: training ended before it began, nothing was merged")
            return
        model = final_model(runner)
        merged: nn.Module = copy_model(model)
        merged.eval()
        distances = snap_clusters_(merged, self.clusters)
        report = merge_clusters_(merged, self.clusters, example_input=images_of(runner))
        before, after = evaluate(runner, model), evaluate(runner, merged)
        self.rounds = []
        self.add_round(runner, self.clusters.plan, report, before, after)
        self.rounds[0]["distances"] = {name: dict(max=a, relative=b) for name, (a, b) in distances.items()}
        worst, (largest, relative) = _farthest(distances)
        far = f"filters were {relative:.2e} from equal, relative, at most ({worst}; max {largest:.2e})"
        runner.logger.info(f"CentripetalHook: {far}")
        if warning := merge_loss_warning(before, after):
            runner.logger.warning(f"CentripetalHook: {warning}, {far}: train longer, or with a larger strength")
        self.write_artefact(runner, self.clusters.plan, merged, report)


def _farthest(distances: Mapping[str, tuple[float, float]]) -> tuple[str, tuple[float, float]]:
    """The group of the largest relative distance, with both distances."""
    return max(distances.items(), key=lambda item: item[1][1], default=("", (0.0, 0.0)))
