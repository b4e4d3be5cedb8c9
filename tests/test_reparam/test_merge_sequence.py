"""Already trained, zero-padded linear sequences merged into one layer, exact at the border."""

import numpy as np
import pytest
import torch
from torch import nn

import rep_plugin
from rep_plugin.errors import RepPluginError
from rep_plugin.reparam.border_conv import BorderConv2d
from rep_plugin.testing import calibrate_random_bn_
from tests.helpers import randomise_bn_, relative_error


def bottleneck(c_in, c_mid, c_out, k=3, stride=1, groups=None, padding=None, bias=False) -> nn.Sequential:
    """A linear inverted residual's body as it is trained in stock networks: the middle layer pads for itself."""
    padding = k // 2 if padding is None else padding
    return nn.Sequential(
        nn.Conv2d(c_in, c_mid, 1, bias=bias),
        nn.BatchNorm2d(c_mid),
        nn.Conv2d(c_mid, c_mid, k, stride, padding, groups=groups or c_mid, bias=bias),
        nn.BatchNorm2d(c_mid),
        nn.Conv2d(c_mid, c_out, 1, bias=bias),
        nn.BatchNorm2d(c_out),
    )


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (2, 2), (5, 5), (8, 8), (7, 10)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("k, groups", [(3, None), (5, None), (3, 1), (3, 4)])
def test_sequence_is_exact_at_every_size(size, stride, k, groups):
    seq = randomise_bn_(bottleneck(6, 12, 8, k, stride, groups)).double().eval()
    merged = rep_plugin.merge_sequence(seq)
    x = torch.randn(2, 6, *size, dtype=torch.float64)
    assert isinstance(merged, BorderConv2d) and merged.kernel_size == (k, k) and merged.stride == (stride, stride)
    assert relative_error(seq(x), merged(x)) < 1e-12


@pytest.mark.parametrize("padding", [(0, 2), (2, 1), (1, 0)])
def test_any_padding_and_nested_parts(padding):
    inner = bottleneck(6, 12, 8, padding=padding, bias=True)
    seq = nn.Sequential(nn.BatchNorm2d(6), nn.Identity(), nn.Dropout(0.5), nn.Sequential(inner), nn.AvgPool2d(2))
    randomise_bn_(seq).double().eval()
    merged = rep_plugin.merge_sequence(seq)
    for size in ((12, 12), (11, 8)):
        x = torch.randn(1, 6, *size, dtype=torch.float64)
        assert relative_error(seq(x), merged(x)) < 1e-12


def test_without_a_bias_before_the_padding_it_is_a_plain_convolution():
    seq = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 4, 3, padding=1), nn.BatchNorm2d(4))
    randomise_bn_(seq).double().eval()
    merged = rep_plugin.merge_sequence(seq)
    x = torch.randn(2, 3, 6, 7, dtype=torch.float64)
    assert type(merged) is nn.Conv2d and relative_error(seq(x), merged(x)) < 1e-12


def test_what_is_no_single_convolution_is_refused():
    with pytest.raises(TypeError, match="ReLU is not linear"):
        rep_plugin.merge_sequence(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1)).eval())
    with pytest.raises(RuntimeError, match="train mode"):
        rep_plugin.merge_sequence(bottleneck(3, 6, 3))
    with pytest.raises(ValueError, match="not one convolution"):
        rep_plugin.merge_sequence([nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)])
    with pytest.raises(ValueError, match="no convolution to merge into"):
        rep_plugin.merge_sequence(nn.Sequential(nn.BatchNorm2d(3)).eval())
    with pytest.raises(TypeError, match="not a convolution at the border"):
        rep_plugin.merge_sequence([nn.Conv2d(3, 3, 1), nn.AvgPool2d(3, 1, 1, count_include_pad=False)])


class ConvNormAct(nn.Sequential):
    """Has the name of a Conv-BN holder, and another forward."""

    def forward(self, x):
        return super().forward(x).relu()


def _layers(change) -> nn.Sequential:
    seq = randomise_bn_(bottleneck(4, 8, 4, padding=0)).eval()
    change(seq)
    return seq


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda seq: seq[1].register_forward_hook(lambda module, args, out: out.clamp(-0.1, 0.1)),
            "BatchNorm2d has a forward hook",
        ),
        (lambda seq: setattr(seq[2], "forward", lambda x: nn.Conv2d.forward(seq[2], x).abs()), "a forward of its own"),
        (lambda seq: seq.insert(2, nn.Dropout(0.5).train()), "'2' .Dropout. is in train mode"),
        (lambda seq: seq.__setitem__(0, ConvNormAct(seq[0], nn.BatchNorm2d(8).eval())), "whole model differs"),
        (lambda seq: seq[0].weight.data.fill_(float("nan")), "not finite"),
        (lambda seq: (seq[1].running_var.zero_(), setattr(seq[1], "eps", 0.0)), "not finite"),
        (lambda seq: (seq.half(), seq[3].running_var.zero_(), setattr(seq[3], "eps", 1e-12)), "out of the range"),
    ],
    ids=["hook", "patched forward", "active dropout", "name of a holder", "NaN", "zero variance", "float16 overflow"],
)
def test_layers_that_compute_something_else_are_refused(change, words):
    seq = _layers(change)
    state = {name: value.clone() for name, value in seq.state_dict().items()}
    with pytest.raises(RepPluginError, match=words):
        rep_plugin.merge_sequence(seq)
    assert all(torch.equal(value.nan_to_num(), state[name].nan_to_num()) for name, value in seq.state_dict().items())


def test_merged_layer_is_trainable_and_keeps_dtype():
    seq = randomise_bn_(bottleneck(4, 8, 4)).eval()
    merged = rep_plugin.merge_sequence(seq)
    merged(torch.randn(1, 4, 5, 5)).sum().backward()
    assert all(p.grad is not None and p.dtype == torch.float32 for p in merged.parameters())
    seq.requires_grad_(False)
    assert not any(p.requires_grad for p in rep_plugin.merge_sequence(seq).parameters())


class Net(nn.Module):
    """Two linear sequences that pay off, one that would cost more, one whose middle is read twice."""

    def __init__(self):
        super().__init__()
        self.body = bottleneck(8, 48, 8)
        self.low_rank = nn.Sequential(nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1))
        self.first, self.second = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.a, self.b = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        x = torch.relu(x + self.body(x))
        x = torch.relu(self.low_rank(x))
        x = torch.relu(self.norm(self.second(self.first(x))))
        y = self.a(x)
        return self.b(y) + y


def test_reparameterize_merges_the_sequences_that_pay_off():
    model = calibrate_random_bn_(Net(), torch.randn(4, 8, 12, 12))
    merged, report = rep_plugin.reparameterize(model, torch.randn(2, 8, 12, 12), merge_linear=True)
    sequences = {block.name: block.kind for block in report.blocks if block.kind.startswith("linear sequence")}
    assert set(sequences) == {"body.0", "first"} and "body.5" in sequences["body.0"]
    assert isinstance(merged.body[0], BorderConv2d) and isinstance(merged.body[4], nn.Identity)
    assert isinstance(merged.low_rank[1], nn.Conv2d) and isinstance(merged.b, nn.Conv2d)
    assert report.max_rel_error < 1e-12 and report.sensitivity > 0.05 and report.macs_after < report.macs_before
    kept, report = rep_plugin.reparameterize(model, torch.randn(2, 8, 12, 12))
    assert isinstance(kept.body[4], nn.Conv2d) and len(report.blocks) == 4


def test_a_ring_left_out_would_be_noticed(monkeypatch):
    monkeypatch.setattr(BorderConv2d, "forward", nn.Conv2d.forward)
    model = calibrate_random_bn_(Net(), torch.randn(4, 8, 12, 12))
    with pytest.raises(rep_plugin.EquivalenceError, match="whole model differs"):
        rep_plugin.reparameterize(model, torch.randn(2, 8, 12, 12), merge_linear=True)


def test_exports_to_onnx_at_any_size(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    seq = randomise_bn_(bottleneck(3, 6, 4)).eval()
    merged, path = rep_plugin.merge_sequence(seq), tmp_path / "border.onnx"
    sizes = {2: "height", 3: "width"}
    torch.onnx.export(
        merged, (torch.randn(1, 3, 8, 8),), path, dynamo=False, input_names=["x"], dynamic_axes={"x": sizes}
    )
    session = onnxruntime.InferenceSession(path)
    for size in ((8, 8), (5, 3), (1, 1)):
        x = torch.randn(1, 3, *size)
        out = session.run(None, {"x": x.numpy()})[0]
        np.testing.assert_allclose(out, seq(x).detach().numpy(), rtol=1e-3, atol=1e-4)
