"""ReparamHook: write the deployed model when training is over."""

from pathlib import Path

from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner

from rep_plugin.arguments import Name, checked
from rep_plugin.blocks.annealed import annealed_modules, set_alpha_
from rep_plugin.checkpoints.strict import require_fit
from rep_plugin.errors import AnnealError
from rep_plugin.measure.copies import copy_model
from rep_plugin.openmmlab.artefacts import deployed_form, write_deployed
from rep_plugin.openmmlab.configs import pruned_config
from rep_plugin.openmmlab.hooks.base_pruning_hook import PruningHook
from rep_plugin.openmmlab.hooks.linearize_hook import LinearizeHook
from rep_plugin.openmmlab.hooks.runner_utils import (
    check_out_dir,
    final_model,
    images_of,
    log_advice,
    plain_model,
    rehearsal,
    was_over,
)
from rep_plugin.openmmlab.load import build_model, real_inputs
from rep_plugin.pruning.planning.plan import compose_plans
from rep_plugin.registry import HOOKS


@checked
@HOOKS.register_module()
class ReparamHook(Hook):
    """After training, merge a copy of the model, prove it on random and real images, and write the artefact.

    Writes ``deploy.pth``, ``deploy.py`` and the report, ``deploy.json .html``, and logs it. The trained model itself is not
    changed. What a PruneHook has narrowed in training is merged in that form.

    Args:
        out_dir: Folder of the files; default: the work directory.

    Raises:
        EquivalenceError: The proof fails.
        AnnealError: Before training, for annealed blocks (``anneal=True``) that no LinearizeHook leads to their end.
        HookError: Before training, where nothing can be merged, or the merged network would have no config.

    Example:
        >>> custom_hooks = [dict(type="rep_plugin.ReparamHook")]
    """

    priority = "VERY_LOW"  # after the last checkpoint

    def __init__(self, out_dir: Name | None = None):
        self.out_dir = out_dir
        self._begun = 0

    def before_train(self, runner: Runner) -> None:
        self._begun = runner.iter
        lowest = min((module.alpha for module in annealed_modules(runner.model)), default=1.0)
        if lowest < 1 and not any(isinstance(hook, LinearizeHook) for hook in runner.hooks):
            raise AnnealError(
                f"the model ends at alpha {lowest:.4g} and could not be merged: add dict(type='rep_plugin.LinearizeHook', "
                "end=...) to custom_hooks"
            )
        log_advice(runner)
        check_out_dir(runner, self.out_dir)
        if any(isinstance(hook, LinearizeHook) and hook.pending for hook in runner.hooks):
            return  # what will be merged is not known yet
        model = copy_model(plain_model(runner))
        set_alpha_(model, 1.0)
        with rehearsal("ReparamHook"):
            merged, deployed, _ = deployed_form(model, _config_of(runner), images_of(runner, 2), verify=False)
            require_fit(build_model(deployed), merged.state_dict(), "the merged model")

    def after_train(self, runner: Runner) -> None:
        if not is_main_process():
            return
        if was_over(runner, self._begun, Path(self.out_dir or runner.work_dir) / "deploy.pth"):
            runner.logger.info("ReparamHook: training was over before, its deployed model stays as it is")
            return
        model = final_model(runner)
        loader = (runner.val_loop or runner.train_loop).dataloader
        out_dir = self.out_dir or runner.work_dir
        meta = getattr(loader.dataset, "metainfo", None)
        report = write_deployed(model, _config_of(runner), out_dir, real_inputs(model, loader), meta)
        runner.logger.info(f"deployed model written to {out_dir}/deploy.pth and deploy.py\n{report}")


def _config_of(runner: Runner) -> Config:
    """The config that builds the model in training: the runner's own, or that of what was pruned meanwhile."""
    plans = [plan for hook in runner.hooks if isinstance(hook, PruningHook) for plan in hook.plans_of(runner)]
    return pruned_config(runner.cfg, compose_plans(plans)) if plans else runner.cfg
