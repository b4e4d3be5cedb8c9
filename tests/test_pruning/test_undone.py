"""Where the surgery fails at any step, the model, its optimizer and its average are as they were."""

import copy
import importlib
from collections import Counter

import pytest
import torch
from torch import nn

import rep_plugin
from rep_plugin import apply_plan, plan_pruning
from rep_plugin.blocks import RepVGGBlock
from rep_plugin.blocks.layers import NormedConv2d
from rep_plugin.errors import EquivalenceError
from rep_plugin.history import history_of
from rep_plugin.measure.copies import copy_model
from rep_plugin.pruning import apply
from rep_plugin.pruning.surgery import remove
from rep_plugin.testing import calibrate_random_bn_

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
STEPS = {
    "_slice_parameter": remove,
    "slice_tensor": remove,
    "_like": remove,
    "keep_filters_": remove,
    "_set_numbers": remove,
    "_set_owners": remove,
    "describe_features_": remove,
    "remove_channels_": apply,
    "_refresh_table": apply,
    "count_params": apply,
    "_macs": apply,
    "record_": apply,
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.block, self.normed = RepVGGBlock(16, 24, 3), NormedConv2d(nn.Conv2d(24, 16, 1, bias=False))
        self.head, self.num_features = nn.Linear(16, 5), 16
        self.feature_info = [dict(num_chs=24, module="block")]
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward_features(self, x):
        return self.normed(self.block(self.bn(self.conv(x)).relu())).relu()

    def forward(self, x):
        self.calls += 1
        return self.head(self.forward_features(x).mean((2, 3)))


class Average(nn.Module):
    """As mmengine's: a copy, and a table of its tensors by name."""

    def __init__(self, model):
        super().__init__()
        self.module = copy_model(model)
        self.avg_parameters = dict(self.module.named_parameters())


def print_of(*models, optimizer=None):
    """All that a model is, to compare: values, places in memory, gradients, numbers, modes, hooks."""
    found = {}
    for index, model in enumerate(models):
        for name, t in (*model.named_parameters(), *model.named_buffers()):
            grad = None if t.grad is None else t.grad.tolist()
            found[index, name] = id(t), t.tolist(), t.stride(), t.dtype, t.requires_grad, grad
        for name, module in model.named_modules():
            plain = {
                k: copy.deepcopy(v) for k, v in vars(module).items() if isinstance(v, (int, str, tuple, list, float))
            }
            hooks = {k: list(v) for k, v in vars(module).items() if k.endswith("_hooks")}
            found[index, name, "module"] = (
                id(module),
                plain,
                hooks,
                module.training,
                [*module._modules],
                list(vars(module)),
            )
    if optimizer is not None:
        found["optimizer"] = [
            (id(p), {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in state.items()})
            for p, state in optimizer.state.items()
        ]
    return found


def trained():
    torch.manual_seed(0)
    net = Net().eval()
    calibrate_random_bn_(net, X)
    net.to(memory_format=torch.channels_last)
    net.head.register_forward_hook(lambda module, args, output: output)
    optimizer = torch.optim.Adam(net.parameters())
    net(X).sum().backward()
    optimizer.step()
    return net, optimizer, Average(net)


def failing(monkeypatch, module, name, at, error=RuntimeError):
    """Let the call of this number fail, and count all."""
    own, calls = getattr(module, name), Counter()

    def run(*args, **kwargs):
        calls["all"] += 1
        if calls["all"] == at:
            raise error("injected")
        return own(*args, **kwargs)

    monkeypatch.setattr(module, name, run)
    return calls


@pytest.mark.parametrize("step", STEPS)
def test_every_step_is_undone(step, monkeypatch):
    net, optimizer, ema = trained()
    plan = plan_pruning(net, X, "l1", 0.4)
    with monkeypatch.context() as patch:
        calls = failing(patch, STEPS[step], step, 0)
        apply_plan(copy_model(net), plan, ema=Average(net), verify=False)
    number = calls["all"]
    assert number >= 1
    before = print_of(net, ema, optimizer=optimizer), dict(ema.avg_parameters)
    for at in sorted({1, 1 + number // 2, number}):
        error = KeyboardInterrupt if at == number else RuntimeError
        with monkeypatch.context() as patch:
            failing(patch, STEPS[step], step, at, error)
            with pytest.raises(error, match="injected"):
                apply_plan(net, plan, optimizer, ema=ema, verify=False)
        assert print_of(net, ema, optimizer=optimizer) == before[0], f"{step}, call {at} of {number}"
        assert all(ema.avg_parameters[name] is value for name, value in before[1].items())
    assert history_of(net) == []
    report = apply_plan(net, plan, optimizer, ema=ema)  # and it still goes
    assert report.max_rel_error < 1e-9
    net(X).sum().backward()
    optimizer.step()


VERBS = {
    "reparameterize": lambda net, **kw: rep_plugin.reparameterize(net, X, **kw),
    "keep_bn": lambda net, **kw: rep_plugin.reparameterize(net, X, fold_bn=False, **kw),
    "expand": lambda net, **kw: rep_plugin.expand(net, "acb", example_input=X, **kw),
}


@pytest.mark.parametrize("verb", [*VERBS, "plan", "export", "summary"])
def test_what_is_done_to_a_copy_leaves_the_model_bit_by_bit(verb, tmp_path):
    net, optimizer, _ = trained()
    net.train()
    net.eval()
    example = X.clone().requires_grad_()
    before, given = print_of(net, optimizer=optimizer), example.detach().clone()
    if verb == "plan":
        plan_pruning(net, example, "l1", 0.4)
    elif verb == "export":
        rep_plugin.export_onnx(net, tmp_path / "net.onnx", example, rounds=1, runtimes=["onnxruntime"])
    elif verb == "summary":
        from rep_plugin.summary import summarize

        summarize(net, example)
    elif verb == "expand":
        rep_plugin.expand(net, "acb", example_input=example)
    else:
        rep_plugin.reparameterize(net, example, fold_bn=verb != "keep_bn")
    assert print_of(net, optimizer=optimizer) == before
    assert torch.equal(example, given) and example.grad is None


class WorksInPlace(Net):
    """Changes the images that it is given, and counts."""

    def forward(self, x):
        return super().forward(x.mul_(0.5).sub_(0.1))


def test_the_callers_images_stay(tmp_path):
    net = WorksInPlace().eval()
    calibrate_random_bn_(net, X.clone())
    example, given = X.clone(), X.clone()
    rep_plugin.reparameterize(net, example)
    rep_plugin.expand(net, "acb", example_input=example)
    plan = plan_pruning(net, example, "l1", 0.3)
    apply_plan(copy_model(net), plan, example_input=example)
    rep_plugin.export_onnx(net, tmp_path / "net.onnx", example, images=example, rounds=1, runtimes=["onnxruntime"])
    targets = torch.zeros(2, dtype=torch.long)
    plan_pruning(net, example, "taylor", 0.3, loader=[(example, targets)], loss=nn.functional.cross_entropy)
    plan_pruning(net, example, "l1", latency_ms=1e3)
    assert torch.equal(example, given)


@pytest.mark.parametrize(
    ("verb", "options"),
    [
        ("reparameterize", {}),
        ("reparameterize", {"verify": False}),
        ("keep_bn", {}),
        ("keep_bn", {"verify": False}),
        ("expand", {}),
    ],
)
def test_merging_and_expanding_in_place_are_undone(verb, options, monkeypatch):
    net, optimizer, _ = trained()
    before = print_of(net, optimizer=optimizer)
    module = importlib.import_module(f"rep_plugin.reparam.{'expand' if verb == 'expand' else 'reparameterize'}")
    for name, at in (("count_params", 2), ("record_", 1)):
        with monkeypatch.context() as patch:
            failing(patch, module, name, at)
            with pytest.raises(RuntimeError, match="injected"):
                VERBS[verb](net, inplace=True, **options)
        assert print_of(net, optimizer=optimizer) == before


def test_values_that_half_precision_cannot_hold_leave_the_model(monkeypatch):
    net, _, _ = trained()
    net.bn.running_var.fill_(1e-14)
    net.bn.eps, net.conv.weight.data = 1e-14, net.conv.weight.data * 1e4
    net.half()
    before = print_of(net)
    with pytest.raises(EquivalenceError):
        rep_plugin.reparameterize(net, X.half(), inplace=True)
    assert print_of(net) == before
