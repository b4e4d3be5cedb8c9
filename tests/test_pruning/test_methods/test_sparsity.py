"""The terms of sparse training against the same training written out by hand."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from rep_plugin.backbones.rep_mobilenet_v2 import RepMobileNetV2
from rep_plugin.pruning import plan_pruning
from rep_plugin.pruning.apply import apply_plan
from rep_plugin.pruning.methods.sparsity import Sparsity, all_parts, prunable_parts, strengths_of
from tests.helpers import relative_error
from tests.test_pruning.loops import batches, gradients_by_hand, new_scaler, run_training

L1, LASSO, LR = 0.03, 0.02, 0.1


def net(amp: bool = False) -> nn.Sequential:
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2),
    )  # fmt: skip
    for index in (1, 4):
        nn.init.uniform_(model[index].weight, -1, 1)
    return model if amp else model.double()  # mixed precision casts single precision only


def sparse(model: nn.Module, mode: str, lasso: float = 0.0) -> Sparsity:
    kernels = {model[0].weight: lasso, model[3].weight: lasso} if lasso else {}
    return Sparsity({model[1].weight: L1, model[4].weight: 10 * L1}, kernels, mode)


def by_hand(
    mode: str, lasso: float, dtype, accumulate: int, clip: float | None, scale: float, ranks: int = 1
) -> nn.Module:
    """Plain SGD with momentum; the term is added to averaged, clipped gradients, or applied after the step."""
    model = net(amp=dtype is not None)
    momentum = {p: torch.zeros_like(p) for p in model.parameters()}
    strengths = {model[1].weight: L1, model[4].weight: 10 * L1}
    for grads in gradients_by_hand(model, dtype, accumulate, clip, scale, ranks):
        for p, grad in grads.items():
            if mode == "subgradient":
                for j, value in enumerate(p) if p in strengths else ():
                    grad[j] += strengths[p] * (1 if value > 0 else -1 if value < 0 else 0)
                if lasso and p.dim() == 4:
                    for j, row in enumerate(p):
                        grad[j] += lasso * row / row.square().sum().sqrt()
            momentum[p] = 0.9 * momentum[p] + grad
            p -= LR * momentum[p]
            if mode == "proximal":
                for j, value in enumerate(p) if p in strengths else ():
                    t = LR * strengths[p]
                    p[j] = value - t if value > t else value + t if value < -t else 0
                if lasso and p.dim() == 4:
                    for j, row in enumerate(p):
                        p[j] = row * max(0.0, 1 - LR * lasso / row.square().sum().sqrt().item())
    return model


def by_optimizer(mode, lasso, dtype, accumulate, clip, scaler=None, fused=False, rank=None) -> nn.Module:
    model = net(amp=dtype is not None)
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9, fused=fused)
    sparse(model, mode, lasso).attach([optimizer])
    run_training(model, optimizer, dtype, accumulate, clip, scaler, rank)
    return model


CASES = {
    "fp32": (None, 1, None, None, False),
    "bf16": (torch.bfloat16, 1, None, None, False),
    "fp16, scaled": (torch.float16, 1, None, new_scaler, False),
    "accumulated": (None, 4, None, None, False),
    "clipped": (None, 1, 0.05, None, False),
    "all": (torch.float16, 4, 0.05, new_scaler, False),
    "fused, scaled": (None, 4, None, new_scaler, True),
    "fused, scaled, clipped": (None, 1, 0.05, new_scaler, True),
}


@pytest.mark.parametrize("mode", ["subgradient", "proximal"])
@pytest.mark.parametrize("case", list(CASES))
def test_equals_training_written_by_hand(case, mode):
    dtype, accumulate, clip, make_scaler, fused = CASES[case]
    for lasso in (0.0, LASSO):
        expected = by_hand(mode, lasso, dtype, accumulate, clip, 256.0 if make_scaler else 1.0)
        found = by_optimizer(mode, lasso, dtype, accumulate, clip, make_scaler and make_scaler(), fused)
        for (name, a), b in zip(expected.named_parameters(), found.parameters()):
            assert relative_error(a, b) < (1e-9 if dtype is None else 1e-6), (name, lasso)
    moved = [relative_error(a, b.double()) for a, b in zip(net().parameters(), found.parameters())]
    assert max(moved) > 1e-3


def test_two_processes_equal_training_written_by_hand(tmp_path):
    """Real processes with gloo, each with half of every batch; all cases, and both processes hold the same bits."""
    code = """
import os, sys, torch, torch.distributed as dist
from tests.test_pruning.test_methods.test_sparsity import CASES, LASSO, by_optimizer
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
found = {}
for case, (dtype, accumulate, clip, make_scaler, fused) in CASES.items():
    for mode in ("subgradient", "proximal"):
        scaler = make_scaler and make_scaler()
        model = by_optimizer(mode, LASSO, dtype, accumulate, clip, scaler, fused, rank)
        found[f"{case}|{mode}"] = [p.detach() for p in model.parameters()]
torch.save(found, f"{folder}/{rank}.pt")
dist.destroy_process_group()
os._exit(0)  # torch 2.14 with gloo now and then aborts while Python takes it down
"""
    command = [sys.executable, "-W", "ignore", "-c", code]
    processes = [subprocess.Popen([*command, str(rank), str(tmp_path)], stderr=subprocess.PIPE) for rank in range(2)]
    for process in processes:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors.decode()
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert len(first) == 2 * len(CASES)
    for key, found in first.items():
        case, mode = key.split("|")
        dtype, accumulate, clip, make_scaler, _ = CASES[case]
        expected = by_hand(mode, LASSO, dtype, accumulate, clip, 256.0 if make_scaler else 1.0, ranks=2)
        for (name, a), b, other in zip(expected.named_parameters(), found, second[key], strict=True):
            assert torch.equal(b, other), (key, name)
            assert relative_error(a, b) < (1e-9 if dtype is None else 1e-6), (key, name)


@pytest.mark.parametrize("mode", ["subgradient", "proximal"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_overflowed_leaves_everything(mode, fused):
    model = net()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), LR, fused=fused)
    sparse(model, mode, LASSO).attach([optimizer])
    grads = new_scaler()
    grads.scale(nn.functional.cross_entropy(model.eval()(batches(1)[0][0]), torch.zeros(4).long())).backward()
    model[0].weight.grad[0, 0, 0, 0] = torch.inf
    grads.step(optimizer)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_proximal_reaches_exactly_zero_and_detached_does_nothing():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), LR)
    term = sparse(model, "proximal", lasso=30.0)
    term.attach([optimizer])

    def step():
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()

    for _ in range(40):
        step()
    assert (model[4].weight == 0).all() and 0 < (model[1].weight == 0).sum() < 6
    assert (model[0].weight == 0).all() and torch.isfinite(model[3].weight).all()
    term.detach()
    before = model[1].weight.clone()
    step()
    assert torch.equal(model[1].weight, before)


def test_strengths_stay_with_parameters_through_pruning():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), LR)
    term = sparse(model, "subgradient")
    term.attach([optimizer])
    apply_plan(model, plan_pruning(model.eval(), (1, 3, 8, 8), prune_fraction=0.4), optimizer)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    before = model[1].weight.detach().clone()
    optimizer.step()
    assert len(before) < 6 and torch.allclose(model[1].weight, before - LR * L1 * before.sign())


def test_only_outer_norms_of_blocks_are_taken():
    model = RepMobileNetV2(widen_factor=0.35, out_indices=(7,))
    norms, kernels = prunable_parts(model, (1, 3, 32, 32))
    assert norms and not any("expand_bn" in name or "depthwise_bn" in name for name in norms)
    everything, _ = all_parts(model)
    assert set(norms) <= set(everything) and not any("expand_bn" in name for name in everything)
    assert not any("branches" in name for name in kernels)


def test_what_cannot_be_pruned_is_not_pulled():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5))
    assert prunable_parts(model, (1, 3, 8, 8)) == (["1"], ["0"])
    assert all_parts(model) == (["1", "4"], ["0", "3"])


def test_bad_arguments_are_named():
    assert strengths_of(["a.bn1", "a.bn2", "b"], 1.0, {"*.bn2": 3.0, "a.*": 2.0}) == {"a.bn1": 2, "a.bn2": 3, "b": 1}
    with pytest.raises(
        ValueError, match=r"no prunable batch norm is named like 'c\*', expected one of a, b \.\.\."
    ) as e:
        strengths_of(["a", "b"], 1.0, {"c*": 2.0})
    assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="mode must be one of .*, got 'l0'"):
        Sparsity({}, mode="l0")
    with pytest.raises(ValueError, match="none of 2 sparse parameters is in an optimizer"):
        sparse(net(), "proximal").attach([torch.optim.SGD(net().parameters(), 0.1)])
