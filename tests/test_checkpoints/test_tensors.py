"""Weights are found where trainings of different frameworks put them; averaged ones come first."""

import pytest
import torch

from rep_plugin.checkpoints.tensors import read_tensors
from rep_plugin.errors import UnreadableCheckpointError

RAW, EMA = {"conv.weight": torch.zeros(2)}, {"conv.weight": torch.ones(2)}


def behind(prefix: str, state: dict) -> dict:
    return {f"{prefix}{key}": tensor for key, tensor in state.items()}


FILES = {
    "bare": EMA,
    "timm": {"epoch": 3, "arch": "resnet18", "state_dict": RAW, "state_dict_ema": EMA},
    "timm, compiled": {"state_dict": RAW, "state_dict_ema": behind("_orig_mod.", EMA)},
    "RT-DETR": {"model": RAW, "ema": {"module": EMA, "updates": 7}, "last_epoch": 1},
    "mmengine": {"meta": {"epoch": 1}, "state_dict": behind("backbone.", EMA), "ema_state_dict": RAW},
    "DDP, compiled": {"model": behind("module._orig_mod.", EMA)},
    "lightning": {"state_dict": behind("model.", EMA), "hyper_parameters": {}},
    "averaged wrapper": behind("ema_net.module.", EMA),
}


@pytest.mark.parametrize("name", FILES)
def test_weights_are_found(name, tmp_path):
    torch.save(FILES[name], tmp_path / "last.pth")
    found = read_tensors(tmp_path / "last.pth")
    assert list(found) == ["conv.weight"] and torch.equal(found["conv.weight"], EMA["conv.weight"])


def test_a_prefix_that_not_all_share_stays(tmp_path):
    state = behind("backbone.", EMA) | {"head.weight": torch.ones(1)}
    torch.save({"state_dict": state}, tmp_path / "last.pth")
    assert list(read_tensors(tmp_path / "last.pth")) == list(state)


@pytest.mark.parametrize("content", [{}, {"state_dict": {}}, {"state_dict": [1]}, [torch.ones(1)], {"w": "text"}])
def test_files_without_weights_are_refused(content, tmp_path):
    torch.save(content, tmp_path / "last.pth")
    with pytest.raises(UnreadableCheckpointError, match=r"last\.pth holds no weights"):
        read_tensors(tmp_path / "last.pth")
