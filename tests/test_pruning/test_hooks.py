"""Hooks and replaced forwards in a network that is pruned: equal to the masked network, or refused, or left, by name."""

import copy
from types import MethodType

import pytest
import torch
from torch import nn

from rep_plugin import apply_plan, plan_pruning
from rep_plugin.blocks.families import RepVGGBlock
from rep_plugin.errors import EquivalenceError
from rep_plugin.pruning.apply import kept_by
from rep_plugin.pruning.surgery import mask_channels_
from rep_plugin.pruning.tracing import trace_channels
from rep_plugin.testing import calibrate_random_bn_

X = torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
GAIN = torch.linspace(0.5, 2, 12, dtype=torch.float64).view(1, 12, 1, 1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU()
        self.block, self.depthwise = RepVGGBlock(12, 12), nn.Conv2d(12, 12, 3, groups=12)
        self.out, self.fc = nn.Conv2d(12, 8, 1), nn.Linear(8, 5)

    def forward(self, x):
        x = self.depthwise(self.block(self.act(self.bn(self.conv(x))))).relu()
        return self.fc(self.out(x).mean((2, 3)))


def observe(module, args, output):
    module.seen = output.shape


def clamp(module, args, output):
    return output.clamp(-1, 1)


def lift(module, args, output):
    return output + 1  # a removed channel is no longer zero behind it


def lift_in_place(module, args, output):
    output.add_(1)


def count(module, args, output):
    return output * (output.shape[1] / 12)


def gain(module, args, output):
    return output * GAIN.to(output.device)


def unseen(module, args, output):
    output.data.add_(1)


def rearrange(module, args, output):
    return output.view(len(output), 12, -1).flip(1).view(output.shape)


def attach(module, hook, how):
    if how == "hook":
        module.register_forward_hook(hook)
        return

    def forward(self, x):
        output = type(self).forward(self, x)
        changed = hook(self, (x,), output)
        return output if changed is None else changed

    module.forward = MethodType(forward, module)


def outcome(where, hook, how) -> tuple[str, str]:
    """What becomes of a network: ``equal``, ``refused`` with the message, or ``left`` with the reason."""
    torch.manual_seed(0)
    net = calibrate_random_bn_(Net(), X.float()).double()
    attach(net.get_submodule(where), hook, how)
    plan = plan_pruning(net, X, "random", 0.4, min_channels=2)
    trace = trace_channels(net, plan.input_shape)
    masked = mask_channels_(copy.deepcopy(net), trace, kept_by(plan, net, trace))
    state = copy.deepcopy(net.state_dict())
    try:
        apply_plan(net, plan)
    except EquivalenceError as error:
        assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
        return "refused", str(error)
    for scale in (1e-3, 1, 1e3):
        expected = masked(scale * X)
        assert (net(scale * X) - expected).abs().max() <= 1e-9 * expected.abs().max()
    return ("left", plan.frozen["block"]) if "block" in plan.frozen else ("equal", "")


HOOKS = {clamp: "equal", lift: "equal", lift_in_place: "equal", count: "refused", rearrange: "left", gain: "left"}
SOME = {"conv": HOOKS, "bn": (lift, count), "act": (clamp, gain), "depthwise": (observe, unseen)}


@pytest.mark.parametrize("how", ["hook", "forward"])
@pytest.mark.parametrize(("where", "hook"), [(where, hook) for where, hooks in SOME.items() for hook in hooks])
def test_on_plain_layers(where, hook, how):
    result, message = outcome(where, hook, how)
    if hook is unseen:  # torch itself does not see what is done through .data
        assert result in ("equal", "refused")
        return
    assert result == HOOKS.get(hook, "equal") and "\n" not in message
    if result == "refused":
        what = "a forward of its own" if how == "forward" else f"a forward hook ({hook.__name__})"
        assert f"'{where}' has {what}" in message
    if result == "left":
        assert ("written out" if hook is rearrange else f"in '{where}'") in message and "test_hooks.py:" in message


@pytest.mark.parametrize(
    ("where", "hook", "how", "expected"),
    [
        ("block", clamp, "hook", ("equal", "")),
        ("block", clamp, "forward", ("left", "'block', which has a forward of its own")),
        ("block", gain, "hook", ("left", "in 'block' (test_hooks.py:")),
        (
            "block.branches.conv.bn",
            clamp,
            "hook",
            ("left", "'block', which holds 'branches.conv.bn', which has a forward"),
        ),
        (
            "block.branches.conv.conv",
            gain,
            "forward",
            ("left", "'block', which holds 'branches.conv.conv', which has a"),
        ),
    ],
)
def test_in_a_block_that_is_one_unit(where, hook, how, expected):
    result, message = outcome(where, hook, how)
    assert result == expected[0] and expected[1] in message


def test_backward_hooks_leave_blocks_prunable():
    net = calibrate_random_bn_(Net(), X.float()).double()
    net.block.branches.conv.bn.register_full_backward_hook(lambda module, given, made: None)
    assert "block" not in plan_pruning(net, X, "random", 0.4, min_channels=2).frozen
