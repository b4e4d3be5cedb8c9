"""StatefulHook: what a hook has to know when training is resumed is kept in the meta data of checkpoints."""

from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner


class StatefulHook(Hook):
    """A hook whose :meth:`state` is kept under ``meta_key`` in a checkpoint's meta data."""

    meta_key = ""

    def state(self) -> Any:
        """Return what the checkpoint keeps; None: nothing."""
        return None

    def load_state(self, state: Any) -> None:
        """Go on from what a checkpoint kept. Called where training is resumed."""

    def load_structure(self, runner: Runner, state: Any) -> None:
        """Change the model so that the checkpoint's weights fit. Called before :meth:`load_state`, also for a test.

        Args:
            runner: Whose model it is.
            state: What the checkpoint kept.
        """

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if (state := self.state()) is not None:
            checkpoint["meta"][self.meta_key] = state

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        state = (checkpoint.get("meta") or {}).get(self.meta_key)
        if state is None:
            return
        self.load_structure(runner, state)
        if runner._resume:
            self.load_state(state)
