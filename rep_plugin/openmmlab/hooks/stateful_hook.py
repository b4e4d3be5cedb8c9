"""StatefulHook: what a hook has to know when training is resumed is kept in the meta data of checkpoints."""

from collections.abc import Mapping
from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner

from rep_plugin.checkpoints.plain import parse_json, require_fields
from rep_plugin.errors import ArgumentError, UnreadableCheckpointError


def parse_kept(text: object, key: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a hook kept in a checkpoint's meta data as JSON.

    Args:
        text: What stands there.
        key: Its key, for the message.
        fields: Name -> annotation of what the hook keeps.

    Returns:
        The data.

    Raises:
        UnreadableCheckpointError: Something else stands there.
    """
    source = f"meta.{key} of the checkpoint is not what its hook keeps"
    if not isinstance(text, str):
        raise UnreadableCheckpointError(f"{source}: got {type(text).__name__}, expected a text")
    try:
        return require_fields(parse_json(text, f"meta.{key} of the checkpoint"), fields, source)
    except ArgumentError as error:
        raise UnreadableCheckpointError(str(error)) from None


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
