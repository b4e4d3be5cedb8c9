"""Training goes on behind ``apply_plan``: half precision, accumulation, averaged copies, wrappers, two processes."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from mmengine.model import ExponentialMovingAverage
from mmengine.optim import OptimWrapper
from torch import nn

from rep_plugin import apply_plan, plan_pruning
from rep_plugin.history import history_of
from rep_plugin.openmmlab.amp import CpuAmpOptimWrapper
from tests.test_pruning.nets import ConvBN, Flat, Gate, Residual, ready

X = torch.randn(4, 3, 13, 13, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 3])


def net_of():
    return ready(ConvBN(3, 16), Residual(16, 24), ConvBN(16, 32), Gate(32, 8), Flat(32))


def plain(net, optimizer):
    F.cross_entropy(net(X), Y).backward()
    optimizer.step()
    optimizer.zero_grad()


def half(dtype, scaler=None):
    def step(net, optimizer):
        with torch.autocast("cpu", dtype):
            loss = F.cross_entropy(net(X).float(), Y)
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()

    return step


STEPS = {
    "float32": lambda: plain,
    "bfloat16": lambda: half(torch.bfloat16),
    "float16, scaled": lambda: half(torch.float16, torch.amp.GradScaler("cpu", init_scale=1024.0)),
}
OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 1e-3),
}


def require_moved(net, before):
    """Every parameter moved, and all are finite."""
    for name, parameter in net.named_parameters():
        assert torch.isfinite(parameter).all() and not torch.equal(parameter, before[name]), name


def snapshot(net):
    return {name: p.detach().clone() for name, p in net.named_parameters()}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("step", STEPS)
def test_steps_go_on(step, optimizer):
    net, step = net_of().train(), STEPS[step]()
    optimizer = OPTIMIZERS[optimizer](net.parameters())
    step(net, optimizer)
    apply_plan(net, plan_pruning(net, X, "l1", 0.4), optimizer)
    assert net.training and net[2].conv.out_channels < 32
    before = snapshot(net)
    for _ in range(2):
        step(net, optimizer)
    require_moved(net, before)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_is_that_of_the_masked_model(optimizer):
    """Pruned or masked, the next step moves what stays by the same amount: momentum and gradient included."""
    net = net_of().double().eval()
    optimizer = OPTIMIZERS[optimizer](net.parameters())
    x = X.double()
    F.cross_entropy(net(x), Y).backward()
    optimizer.step()
    plan = plan_pruning(net, X, "l1", 0.4)
    rows, columns = list(plan.kept["2.conv"]), list(plan.kept["0.conv"])
    gradient, weight = net[2].conv.weight.grad.clone(), net[2].conv.weight.detach().clone()
    states = copy.deepcopy(optimizer.state[net[2].conv.weight])
    alone = nn.Parameter(weight[rows][:, columns].clone())
    other = type(optimizer)(
        [alone], **{k: v for k, v in optimizer.defaults.items() if k in ("lr", "momentum", "nesterov")}
    )
    for key, value in states.items():
        other.state[alone][key] = value[rows][:, columns].clone() if value.dim() else value.clone()
    alone.grad = gradient[rows][:, columns].clone()
    apply_plan(net, plan, optimizer)
    optimizer.step()
    other.step()
    assert torch.equal(net[2].conv.weight, alone)


def test_pruning_between_accumulated_batches():
    """The gradients that have been gathered are sliced, and the next ones are added to them."""
    net = net_of().train()
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    plain(net, optimizer)
    F.cross_entropy(net(X), Y).backward()
    plan = plan_pruning(net, X, "l1", 0.4)
    gathered = net[2].conv.weight.grad[list(plan.kept["2.conv"])][:, list(plan.kept["0.conv"])].clone()
    apply_plan(net, plan, optimizer)
    F.cross_entropy(net(X), Y).backward()
    alone = torch.autograd.grad(F.cross_entropy(net(X), Y), net[2].conv.weight)[0]
    assert torch.allclose(net[2].conv.weight.grad, gathered + alone, atol=1e-6)
    before = snapshot(net)
    optimizer.step()
    require_moved(net, before)


AVERAGES = {
    "torch": torch.optim.swa_utils.AveragedModel,
    "torch, buffers": lambda net: torch.optim.swa_utils.AveragedModel(net, use_buffers=True),
    "mmengine": lambda net: ExponentialMovingAverage(net, momentum=0.1),
    "mmengine, buffers": lambda net: ExponentialMovingAverage(net, momentum=0.1, update_buffers=True),
}


@pytest.mark.parametrize("average", AVERAGES)
def test_averaged_copies_go_on(average):
    net = net_of().train()
    optimizer, ema = torch.optim.Adam(net.parameters(), 1e-2), AVERAGES[average](net)
    for _ in range(2):
        plain(net, optimizer)
        ema.update_parameters(net)
    plan = plan_pruning(net, X, "l1", 0.4)
    expected = ema.module[2].conv.weight[list(plan.kept["2.conv"])][:, list(plan.kept["0.conv"])].clone()
    apply_plan(net, plan, optimizer, ema=ema)
    assert torch.equal(ema.module[2].conv.weight, expected) and not torch.equal(expected, net[2].conv.weight)
    before = snapshot(ema.module)
    plain(net, optimizer)
    ema.update_parameters(net)
    require_moved(ema.module, before)
    assert ema(X).shape == (4, 5) and ema.module[2].conv.out_channels == net[2].conv.out_channels


@pytest.mark.parametrize("wrapper", [OptimWrapper, CpuAmpOptimWrapper])
def test_mmengines_wrappers_go_on(wrapper):
    net = net_of().train()
    wrapped = wrapper(optimizer=torch.optim.SGD(net.parameters(), 0.05, momentum=0.9), accumulative_counts=2)
    wrapped.initialize_count_status(net, 0, 8)

    def step():
        with wrapped.optim_context(net):
            loss = F.cross_entropy(net(X).float(), Y)
        wrapped.update_params(loss)

    for _ in range(3):  # pruned in the middle of an accumulation
        step()
    apply_plan(net, plan_pruning(net, X, "l1", 0.4), wrapped)
    before = snapshot(net)
    for _ in range(3):
        step()
    require_moved(net, before)


def test_two_processes_stay_one_model(tmp_path):
    """Real processes with gloo: wrapped, pruned, wrapped again; every weight trains, and the ranks agree bit for bit."""
    code = """
import os, sys, torch, torch.distributed as dist, torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel as DDP
from rep_plugin import apply_plan, plan_pruning
from tests.test_pruning.test_resume import net_of, snapshot, require_moved
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
torch.manual_seed(0)
net = net_of().train()
optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
torch.manual_seed(rank + 1)  # each has pictures of its own
def steps(model, number):
    for _ in range(number):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(4, 3, 13, 13)), torch.randint(5, (4,))).backward()
        optimizer.step()
wrapped = DDP(net)
steps(wrapped, 2)
plan = plan_pruning(net, (2, 3, 13, 13), "l1", 0.4)
try:
    apply_plan(wrapped, plan, optimizer)
except ValueError as error:
    print(error)
assert net[2].conv.out_channels == 32
apply_plan(wrapped.module, plan, optimizer)
before, old, wrapped = snapshot(net), wrapped, DDP(wrapped.module)  # the old wrapper lives on while the new one is made
steps(wrapped, 3)
require_moved(net, before)
momenta = [optimizer.state[p]["momentum_buffer"] for p in net.parameters()]
torch.save((plan.kept, net.state_dict(), momenta), f"{folder}/{rank}.pt")
try:
    steps(old, 2)
except RuntimeError as error:
    print("old:", str(error).splitlines()[0])
dist.destroy_process_group()
os._exit(0)  # torch 2.14 with gloo now and then aborts while Python takes it down
"""
    command = [sys.executable, "-W", "ignore", "-c", code]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    for process in processes:
        out, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
        refused, old = out.strip().splitlines()
        assert refused == "got a DistributedDataParallel: pass its .module, and wrap the model again"
        assert old.startswith("old: "), "the wrapper of before does not go on silently"
    (kept, state, momenta), other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert kept == other[0] and state["2.conv.weight"].shape[0] < 32
    names = dict(net_of().named_parameters())
    assert all(torch.equal(state[name], other[1][name]) for name in names)
    assert all(torch.equal(one, two) for one, two in zip(momenta, other[2], strict=True))


def whole(net):
    """All that a refused call must leave: tensors, modes, hooks, attributes."""
    modules = {
        name: (m.training, len(m._forward_hooks), len(m._forward_pre_hooks), str(m), sorted(m.__dict__))
        for name, m in net.named_modules()
    }
    return {name: value.clone() for name, value in net.state_dict().items()}, modules, history_of(net)


class OnValues(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)

    def forward(self, x):
        x = self.conv(x)
        return x * 2 if x.sum() > 0 else x


def own_plan(net):
    return plan_pruning(net, X, "l1", 0.3)


ATTACKS = {
    "plan must be a PrunePlan .see PrunePlan.from_json., got '{": lambda n: apply_plan(n, own_plan(n).to_json()),
    "shares parameters with the model": lambda n: apply_plan(n, own_plan(n), ema=n),
    "does not hold the parameters": lambda n: apply_plan(n, own_plan(n), ema=ConvBN(3, 4)),
    "the SGD holds no parameter of this Sequential": lambda n: apply_plan(
        n, own_plan(n), torch.optim.SGD(net_of().parameters(), 0.1)
    ),
    "does not go through Sequential: Given groups=1": lambda n: apply_plan(
        n, own_plan(n), example_input=torch.randn(2, 5, 13, 13)
    ),
    "params .=3. cannot be met: the least that remains is": lambda n: plan_pruning(n, X, "l1", params=3),
    "macs .=.*. cannot be met": lambda n: plan_pruning(n, X, "l1", macs=1e-5),
    "got '0.3'": lambda n: plan_pruning(n, X, "l1", "0.3"),
    "ignore must be a list of strings, got '0.conv'": lambda n: plan_pruning(n, X, "l1", 0.3, ignore="0.conv"),
    "example_input must be a tensor or .* or a shape .N, C, ...., got None": lambda n: plan_pruning(n, None, "l1", 0.3),
    "example_input.2. must be a whole number >= 1, got 13.5": lambda n: plan_pruning(n, (1, 3, 13.5, 13), "l1", 0.3),
    "cannot trace Sequential on an input .* at .*nets.py:[0-9]+: ": lambda n: plan_pruning(n, (1, 4, 13, 13), "l1", 0.3),
    "scores name a layer 'nowhere'": lambda n: plan_pruning(n, X, {"nowhere": [1.0]}, 0.3),
    "cannot trace OnValues on .* at .*test_resume.py:[0-9]+: ": lambda n: plan_pruning(OnValues(), X, "l1", 0.3),
    "nothing in Sequential can be pruned": lambda n: plan_pruning(nn.Sequential(), X, "l1", 0.3),
    "model must be a torch.nn.Module, got 'resnet18'": lambda n: plan_pruning("resnet18", X, "l1", 0.3),
}  # fmt: skip


@pytest.mark.parametrize("message", ATTACKS)
def test_bad_input_is_refused_in_one_line_and_changes_nothing(message):
    net = net_of().train()
    net[0].eval()
    before = whole(net)
    with pytest.raises((ValueError, RuntimeError), match=message) as caught:
        ATTACKS[message](net)
    after = whole(net)
    assert "\n" not in str(caught.value) and before[1:] == after[1:]
    assert all(torch.equal(value, after[0][name]) for name, value in before[0].items())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(bad):
    net = net_of()
    plan = own_plan(net)
    net[4].fc.weight.data[0, 0] = bad
    before = whole(net)
    with pytest.raises(RuntimeError, match="own output is not finite") as caught:
        apply_plan(net, plan)
    with pytest.raises(ValueError, match="scores must be finite numbers, got NaN or infinity"):
        own_plan(net)
    assert "\n" not in str(caught.value) and whole(net)[1:] == before[1:] and net[0].conv.out_channels == 16


def test_compiled_models_are_refused():
    with pytest.raises(ValueError, match="got a compiled model: pass the model itself"):
        plan_pruning(torch.compile(net_of()), X, "l1", 0.3)
