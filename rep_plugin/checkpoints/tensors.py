"""The weights in a checkpoint file, wherever trainings of different frameworks put them."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rep_plugin.arguments import fits
from rep_plugin.checkpoints.safe_load import load_checkpoint_file, load_safetensors
from rep_plugin.errors import UnreadableCheckpointError

# Averaged weights are what a training validates: they come first. mmengine keeps those under ``state_dict``.
PLACES = ("state_dict_ema", "model_ema", "ema_model", "ema", "state_dict", "model", "module")
WRAPPERS = ("module.", "_orig_mod.", "model.", "ema_net.", "ema_model.", "backbone.")


def read_tensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """Read a checkpoint's named tensors, safely: ``.safetensors``, or a file of ``torch.save``.

    Averaged (EMA) weights come first where a file has both. Prefixes that all names share are dropped: of DDP, of
    ``torch.compile`` and of wrappers.

    Args:
        path: the file.

    Returns:
        The tensors by name.

    Raises:
        UnreadableCheckpointError: the file is torn, or holds no named tensors.

    Example:
        >>> import tempfile, torch
        >>> path = f"{tempfile.mkdtemp()}/last.pth.tar"
        >>> torch.save({"state_dict": {"w": torch.zeros(1)}, "state_dict_ema": {"module.w": torch.ones(1)}}, path)
        >>> read_tensors(path)
        {'w': tensor([1.])}
    """
    content: Any = load_safetensors(path) if Path(path).suffix == ".safetensors" else load_checkpoint_file(path)
    while isinstance(content, Mapping):
        inner = next((content[name] for name in PLACES if isinstance(content.get(name), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not fits(content, dict[str, Tensor]) or not content:
        raise UnreadableCheckpointError(f"checkpoint {path} holds no weights, expected names and tensors")
    while prefix := next((p for p in WRAPPERS if all(key.startswith(p) for key in content)), ""):
        content = {key.removeprefix(prefix): tensor for key, tensor in content.items()}
    return dict(content)


def digest_of(state: Mapping[str, Tensor]) -> str:
    """Return a digest of a state dict, names and numbers, bit by bit."""
    digest = hashlib.sha256()
    for name, tensor in state.items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
