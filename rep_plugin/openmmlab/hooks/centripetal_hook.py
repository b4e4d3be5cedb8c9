"""CentripetalHook: train the filters of a cluster to be equal, and make them one at the end, without any loss."""

import copy
from collections.abc import Mapping, Sequence

from mmengine.dist import broadcast_object_list
from mmengine.runner import Runner
from torch import nn

from rep_plugin.errors import ArgumentError, EquivalenceError, HookError
from rep_plugin.openmmlab.hooks.pruning_hook import PruningHook, check_share
from rep_plugin.openmmlab.hooks.runner_utils import (
    evaluate,
    final_model,
    iterations_of,
    lost,
    optimizers_of,
    pictures_of,
    plain_model,
)
from rep_plugin.pruning import TraceError
from rep_plugin.pruning.methods.centripetal import Centripetal, cluster_distances, merge_clusters_, snap_clusters_
from rep_plugin.pruning.methods.clusters import METHODS, Clusters, plan_clusters
from rep_plugin.pruning.methods.sparsity import check_strength
from rep_plugin.pruning.planning import Budget, PruneOptions
from rep_plugin.registry import HOOKS

META = "rep_centripetal"  # in a checkpoint's meta data


@HOOKS.register_module()
class CentripetalHook(PruningHook):
    """Centripetal SGD (Ding et al., CVPR 2019), for coupled layers as well: they share their clusters.

    After ``begin`` epochs (iterations with ``by_epoch=False``) the channels of every group of coupled layers are put in
    ``clusters``, ``kmeans`` of their kernels or ``even``; as many as ``prune_fraction`` (the share of channels removed),
    ``params`` or ``macs`` (what may remain) leave, each group giving an equal share, or as ``widths``, layer -> number,
    says; ``min_channels``, ``round_to``, ``overrides``, ``ignore`` as :func:`rep_plugin.plan_pruning` has them. From then
    on every real step draws the filters of a cluster to their mean, see
    :class:`rep_plugin.pruning.methods.centripetal.Centripetal`; ``strength`` is the paper's epsilon, which a short schedule may
    need larger: ``train/centripetal_distance`` in the log has to come down to 1e-3 or so. Running statistics follow on their
    own, by their momentum.

    After training, on a copy (of the EMA weights, where there are), the members of each cluster are set to their mean
    and made one channel, which the next layers read by the sum of their columns: proven equal, and written as
    ``pruned.pth pruned.py``. There is no fine-tuning. Validation is run before both and after; more than 0.1 point lost
    is a warning. Figures and the distances, max and relative by group, are in ``pruned.rounds.json``.

    Checkpoints hold the clusters, so that a resumed run goes on exactly. A first merge, on a copy, is proven before the
    first step.

    Raises ValueError for bad arguments; :class:`rep_plugin.errors.HookError` where the model cannot be merged so.
    """

    def __init__(
        self,
        prune_fraction: float | None = None,
        *,
        params: int | float | None = None,
        macs: int | float | None = None,
        widths: Mapping[str, int] | None = None,
        clusters: str = "kmeans",
        strength: float = 3e-3,
        begin: float = 0,
        by_epoch: bool = True,
        min_channels: int = 1,
        round_to: int = 1,
        overrides: Mapping[str, float | str] | None = None,
        ignore: Sequence[str] = (),
        seed: int = 0,
        out_dir: str | None = None,
    ):
        super().__init__(out_dir)
        given = dict(prune_fraction=prune_fraction, params=params, macs=macs, widths=widths)
        named = [name for name, value in given.items() if value is not None]
        if len(named) != 1:
            raise ArgumentError(f"give exactly one of {', '.join(given)}, got {named or 'none'}")
        if prune_fraction is not None:
            check_share("prune_fraction", prune_fraction)
        if clusters not in METHODS:
            raise ArgumentError(f"clusters must be one of {METHODS}, got {clusters!r}")
        if not check_strength("strength", strength):
            raise ArgumentError("strength must be > 0, got 0: filters would never become equal")
        if not begin >= 0:
            raise ArgumentError(f"begin must be >= 0, got {begin!r}")
        self.strength, self.begin, self.by_epoch = strength, begin, by_epoch
        self.method, self.budget = clusters, widths or Budget(prune_fraction, params, macs)
        self.options = PruneOptions(
            min_channels=min_channels, round_to=round_to, overrides=overrides, ignore=ignore, seed=seed
        )
        self.clusters: Clusters | None = None
        self.pull: Centripetal | None = None
        self._start = 0

    def before_train(self, runner: Runner) -> None:
        per_unit = iterations_of(runner, self.by_epoch, "CentripetalHook")
        self._start = round(self.begin * per_unit)
        if self._start >= runner.max_iters:
            unit, limit = ("epochs", runner.max_epochs) if self.by_epoch else ("iterations", runner.max_iters)
            raise HookError(f"CentripetalHook.begin (={self.begin}) must be < the training's {limit} {unit}")
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
        model = copy.deepcopy(plain_model(runner))
        model.eval()
        try:
            snap_clusters_(model, clusters)
            merge_clusters_(model, clusters, example_input=pictures_of(runner, 2))
        except (ValueError, EquivalenceError) as error:
            raise HookError(f"CentripetalHook: {error}") from None

    def _plan(self, runner: Runner) -> Clusters:
        """The clusters of the main process: all train alike."""
        try:
            shape = (1, *pictures_of(runner, 1).shape[1:])
            found = plan_clusters(plain_model(runner), shape, self.budget, self.options, self.method)
        except (ValueError, TraceError) as error:
            raise HookError(f"CentripetalHook: {error}") from None
        shared = [found.to_json()]
        broadcast_object_list(shared)
        return Clusters.from_json(shared[0])

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        self._begin_if_due(runner)

    def _begin_if_due(self, runner: Runner) -> None:
        if self.pull is not None or runner.iter < self._start:
            return
        self.clusters = self.clusters or self._plan(runner)
        model, plan = plain_model(runner), self.clusters.plan
        try:
            self.pull = Centripetal(model, self.clusters, self.strength)
            self.pull.attach(optimizers_of(runner))
        except ValueError as error:
            raise HookError(f"CentripetalHook: {error}") from None
        runner.logger.info(
            f"CentripetalHook draws {plan.units[0]} channels into {plan.units[0] - plan.units[1]} ({plan.why}): parameters "
            f"{plan.params_before:,} -> {plan.params_after:,}, multiply-adds {plan.macs_before:,} -> {plan.macs_after:,}"
        )

    def after_train_epoch(self, runner: Runner) -> None:
        if self.pull is not None:
            found = cluster_distances(plain_model(runner), self.pull.members)
            name, (_, relative) = max(found.items(), key=lambda item: item[1][1], default=("", (0.0, 0.0)))
            runner.message_hub.update_scalar("train/centripetal_distance", relative)
            runner.logger.info(f"CentripetalHook: filters are {relative:.2e} from equal, relative, at most ({name})")

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        super().before_save_checkpoint(runner, checkpoint)
        if self.clusters is not None:
            checkpoint["meta"][META] = self.clusters.to_json()

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        super().after_load_checkpoint(runner, checkpoint)
        text = (checkpoint.get("meta") or {}).get(META)
        if text is not None and runner._resume:
            self.clusters = Clusters.from_json(text)

    def after_train(self, runner: Runner) -> None:
        if self.pull is not None:
            self.pull.detach()
        if self.clusters is None:
            runner.logger.warning("CentripetalHook: training ended before it began, nothing was merged")
            return
        model = final_model(runner)
        merged: nn.Module = copy.deepcopy(model)
        merged.eval()
        distances = snap_clusters_(merged, self.clusters)
        report = merge_clusters_(merged, self.clusters, example_input=pictures_of(runner))
        before, after = evaluate(runner, model), evaluate(runner, merged)
        self.rounds = []
        self.note(runner, self.clusters.plan, report, before, after)
        self.rounds[0]["distances"] = {name: dict(max=a, relative=b) for name, (a, b) in distances.items()}
        worst, (largest, relative) = max(distances.items(), key=lambda item: item[1][1], default=("", (0.0, 0.0)))
        far = f"filters were {relative:.2e} from equal, relative, at most ({worst}; max {largest:.2e})"
        runner.logger.info(f"CentripetalHook: {far}")
        if warning := lost(before, after):
            runner.logger.warning(f"CentripetalHook: {warning}, {far}: train longer, or with a larger strength")
        self.finish(runner, self.clusters.plan, merged, report)
