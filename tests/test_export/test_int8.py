"""Quantised files: what is chosen, what is measured, what is refused; ONNX Runtime alone runs them."""

import json
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import onnxruntime.quantization
import pytest
import torch
from torch import nn

import rep_plugin
from rep_plugin.blocks.families import RepVGGBlock
from rep_plugin.errors import ArgumentError, EquivalenceError, MissingPackageError, TrainModeError
from rep_plugin.export import read_metadata
from rep_plugin.optional import is_missing
from rep_plugin.testing import calibrate_random_bn_
from tests.helpers import chain_by_hand

QUICK = dict(methods=["MinMax"], rounds=0, layers=False)


def images(count: int = 40) -> torch.Tensor:
    """Images of four kinds: each has one quarter that is bright."""
    x = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for index in range(count):
        row, column = divmod(index % 4, 2)
        x[index, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] += 3
    return x


X, Y = images(), torch.arange(40) % 4


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = RepVGGBlock(3, 8, stride=2), RepVGGBlock(8, 8, stride=2)
        self.pool, self.fc = nn.AdaptiveAvgPool2d(2), nn.Linear(32, 4)

    def forward(self, x):
        return self.fc(self.pool(self.b(self.a(x))).flatten(1))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    for _ in range(30):
        nn.functional.cross_entropy(model(X), Y).backward()
        optimizer.step(), optimizer.zero_grad()
    return model.eval()


def run(path, x: torch.Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"input": x.numpy()})[0]


def test_the_best_of_all_trials_is_written(net, tmp_path):
    before = {key: value.clone() for key, value in net.state_dict().items()}
    path = tmp_path / "int8.onnx"
    report = rep_plugin.export_int8(net, path, X, Y, rounds=3, with_report=True, class_names=list("abcd"))
    assert {(t.method, t.per_channel) for t in report.trials if not t.equalised} == {
        (method, each) for method in ("MinMax", "Percentile", "Entropy") for each in (False, True)
    }
    assert [t.per_channel for t in report.trials if t.equalised] == [False, True]
    best = max(report.trials, key=lambda trial: trial.sqnr)
    assert (report.method, report.per_channel, report.sqnr) == (best.method, best.per_channel, best.sqnr)
    assert (report.images, report.held_out, report.top1_float) == (32, 8, 1.0)
    assert report.agreement >= 0.9 and report.sqnr > 15 and report.milliseconds > 0
    assert len(report.blocks) == 2 and len(report.layers) == 3
    held = X[4::5]
    found, expected = run(path, held), net(held).detach().numpy()
    noise = 10 * np.log10((expected**2).sum() / ((found - expected) ** 2).sum())
    assert abs(noise - report.sqnr) < 0.5 and (found.argmax(1) == expected.argmax(1)).mean() == report.agreement
    assert run(path, X[:3]).shape == (3, 4)  # the number of images stays open
    kinds = {node.op_type for node in onnx.load(path).graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds and read_metadata(path)["class_names"] == list("abcd")
    assert json.loads((tmp_path / "int8.onnx.json").read_text())["sqnr"] == report.sqnr
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_layers_have_their_ranges_before_and_after_the_merge(net, tmp_path):
    report = rep_plugin.export_int8(net, tmp_path / "net.onnx", X, Y, methods=["MinMax"], rounds=0, with_report=True)
    x = X[torch.arange(40) % 5 != 4]
    for layer, block in zip(report.layers, (net.a, net.b)):
        kernel, bias = block.merged_kernel()
        chains = list(block.branches.values())
        weights = [conv.weight for chain in chains for conv in chain.children() if isinstance(conv, nn.Conv2d)]
        assert layer.largest == pytest.approx(kernel.abs().max().item(), rel=1e-5)
        assert layer.largest_before == max(weight.abs().max().item() for weight in weights)
        spreads = [(each.max() / each.min()).item() for each in (w.flatten(1).abs().amax(1) for w in weights)]
        assert layer.spread_before == pytest.approx(max(spreads), rel=1e-5)
        whole = nn.functional.conv2d(x, kernel, bias, block.stride, block.padding)
        assert layer.range == pytest.approx((whole.min().item(), whole.max().item()), rel=1e-4)
        branches = [chain_by_hand(list(c.children()), x, (c.kernel_size[0] // 2,) * 2) for c in chains]
        branches = [branch[:, :, ::2, ::2] if len(branch[0, 0]) > len(whole[0, 0]) else branch for branch in branches]
        ends = min(b.min().item() for b in branches), max(b.max().item() for b in branches)
        assert layer.range_before == pytest.approx(ends, rel=1e-4)
        x = block(x)
    logits = net(X[torch.arange(40) % 5 != 4])
    (last,) = report.layers[2:]
    assert last.range == pytest.approx((logits.min().item(), logits.max().item()), rel=1e-4)
    assert (last.largest, last.spread) == (last.largest_before, last.spread_before)
    assert " -> " in str(report) and len(report.figures()) == 1
    assert "data:image/png" in (tmp_path / "net.onnx.html").read_text()


def test_the_winner_is_quantised_once(net, tmp_path, monkeypatch):
    calls, original = [], onnxruntime.quantization.quantize_static
    monkeypatch.setattr(
        "onnxruntime.quantization.quantize_static",
        lambda *a, **k: (calls.append(k["nodes_to_exclude"]), original(*a, **k)),
    )
    report = rep_plugin.export_int8(net, tmp_path / "a.onnx", X, **QUICK)
    assert len(calls) == len(report.trials) == 4
    calls.clear()
    kept = rep_plugin.export_int8(net, tmp_path / "b.onnx", X, **QUICK, keep_float=1)
    assert len(calls) == len(kept.trials) + len(kept.layers) + 1 and calls[-1] == kept.kept_float


def test_it_runs_where_rep_plugin_is_not_imported(net, tmp_path):
    rep_plugin.export_int8(net, tmp_path / "int8.onnx", X.split(8), **QUICK)
    np.save(tmp_path / "x.npy", X.numpy())
    code = (
        "import sys, numpy, onnxruntime\n"
        "y = onnxruntime.InferenceSession('int8.onnx').run(None, {'input': numpy.load('x.npy')})[0]\n"
        "assert 'torch' not in sys.modules\nprint(y.argmax(1).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == run(tmp_path / "int8.onnx", X).argmax(1).tolist()


@pytest.mark.parametrize("per_channel", [False, True])
def test_what_is_tried_can_be_chosen(per_channel, net, tmp_path):
    report = rep_plugin.export_int8(net, tmp_path / "net.onnx", X, per_channel=per_channel, equalise=False, **QUICK)
    assert [(t.method, t.per_channel, t.equalised) for t in report.trials] == [("MinMax", per_channel, False)]
    scales = [one for one in onnx.load(tmp_path / "net.onnx").graph.initializer if "weight_scale" in one.name]
    assert scales and all((len(one.dims) == 1 and one.dims[0] > 1) == per_channel for one in scales)
    whole = onnx.load(tmp_path / "net.onnx").graph.initializer
    weights = [onnx.numpy_helper.to_array(one) for one in whole if one.name.endswith("weight_quantized")]
    assert weights and {np.abs(one.astype(int)).max().item() for one in weights} == {64 if per_channel else 127}


def test_nncf_is_one_more_quantiser_where_it_is_installed(net, tmp_path, capsys):
    options = QUICK | dict(methods=["NNCF"], keep_float=1)
    if is_missing("nncf"):
        with pytest.raises(MissingPackageError, match=r"needs nncf, .*pip install 'rep-plugin\[nncf\]'"):
            rep_plugin.export_int8(net, tmp_path / "int8.onnx", X, **options)
        report = rep_plugin.export_int8(
            net, tmp_path / "int8.onnx", X, runtime="openvino", **(QUICK | dict(methods=None))
        )
        assert {trial.method for trial in report.trials} == {"MinMax", "Percentile", "Entropy"}
        return
    states = torch.get_rng_state(), np.random.get_state()[1].tolist()
    with pytest.raises(ArgumentError, match="per_channel=False does not go with .*NNCF chooses scales by itself"):
        rep_plugin.export_int8(net, tmp_path / "int8.onnx", X, per_channel=False, **options)
    report = rep_plugin.export_int8(net, tmp_path / "int8.onnx", X, runtime="openvino", **options)
    assert torch.equal(torch.get_rng_state(), states[0]) and np.random.get_state()[1].tolist() == states[1]
    assert {trial.method for trial in report.trials} == {"NNCF"} and report.per_channel and report.sqnr > 20
    assert len(report.kept_float) == 1 and report.layers and not capsys.readouterr().out
    assert run(tmp_path / "int8.onnx", X[:3]).shape == (3, 4)  # in ONNX Runtime too
    default = rep_plugin.export_int8(net, tmp_path / "a.onnx", X, runtime="openvino", **(QUICK | dict(methods=None)))
    assert {trial.method for trial in default.trials} == {"MinMax", "Percentile", "Entropy", "NNCF"}


def test_openvino_runs_the_same_file(net, tmp_path):
    report = rep_plugin.export_int8(net, tmp_path / "int8.onnx", X, runtime="openvino", **QUICK)
    assert report.runtime == "openvino" and report.agreement >= 0.9


def test_channels_of_unequal_size_need_a_scale_each_or_stay_in_float(net, tmp_path):
    torch.manual_seed(1)
    wide = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3))
    with torch.no_grad():
        factors = torch.logspace(0, 1.5, 16)  # the same function, in scales that one step hardly fits
        for parameter in (wide[2].weight, wide[2].bias):
            parameter /= factors.view(-1, *[1] * (parameter.dim() - 1))
        wide[4].weight *= factors.view(1, -1, 1, 1)
    report = rep_plugin.export_int8(wide.eval(), tmp_path / "a.onnx", X, methods=["MinMax"], rounds=0)
    one, each, even, both = report.trials
    assert (each.per_channel, even.equalised, both.per_channel, both.equalised) == (True, True, True, True)
    assert min(each.sqnr, even.sqnr) > one.sqnr + 1 and both.sqnr > each.sqnr + 5
    assert report.equalised and report.agreement is None
    assert max(layer.spread for layer in report.layers) < 5  # evened out
    kept = rep_plugin.export_int8(wide, tmp_path / "b.onnx", X, methods=["MinMax"], rounds=0, keep_float=1)
    worst = max(report.layers, key=lambda layer: layer.gain)
    assert kept.kept_float == [worst.name] and kept.sqnr > report.sqnr + 1
    assert "dB" in str(kept.layers_table().columns[1].header)


WRONG = {
    "calibration must be 10 images or more, best some hundred, got 8": (X[:8], {}),
    r"calibration must be float32 images .* got torch.float64": (X.double(), {}),
    "calibration must be float32 images .* got none": ([], {}),
    "calibration must be float32 images .* got several sizes": ([X, X[..., :8]], {}),
    "calibration must hold finite values, got 40960": (X[:, :1].expand(-1, 3, -1, -1) * float("nan"), {}),
    "calibration has no data": (X.to("meta"), {}),
    "labels has no data": (X, {"labels": Y.to("meta")}),
    r"labels must be the classes of 40 images, got torch.int64 \(3,\)": (X, {"labels": Y[:3]}),
    r"keep_float must be .*, got -1": (X, {"keep_float": -1}),
    "methods must name some of MinMax": (X, {"methods": []}),
    "path must be that of a file ending in .onnx": (X, {"path": "net.pt"}),
}


@pytest.mark.parametrize("message", WRONG)
def test_refusals_are_one_line_and_write_nothing(message, net, tmp_path):
    x, options = WRONG[message]
    options = {**QUICK, **options}
    path = tmp_path / options.pop("path", "net.onnx")
    x = X * float("nan") if "finite" in message else x
    with pytest.raises(ArgumentError, match=message.replace("40960", r"\d+")) as caught:
        rep_plugin.export_int8(net, path, x, **options)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_too_little_agreement_and_train_mode_are_refused(net, tmp_path):
    (tmp_path / "net.onnx").write_text("old")
    torch.manual_seed(0)
    noise = nn.Sequential(nn.Conv2d(3, 8, 16), nn.Flatten(), nn.Linear(8, 400)).eval()
    with torch.no_grad():
        noise[2].weight.mul_(1e-3)  # logits that hardly differ
        noise[2].bias.fill_(5.0)
    with pytest.raises(
        EquivalenceError, match=r"on \d+.\d% of 8 held-out images, expected min_agreement=1; .*keep_float=3"
    ):
        rep_plugin.export_int8(noise, tmp_path / "net.onnx", X, methods=["MinMax"], rounds=0, min_agreement=1.0)
    net.train()
    try:
        with pytest.raises(TrainModeError):
            rep_plugin.export_int8(net, tmp_path / "net.onnx", X, **QUICK)
    finally:
        net.eval()
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("net.onnx", "old")]


def test_quantising_leaves_the_random_state_and_prints_nothing(net, tmp_path, capsys):
    calibrate_random_bn_(net, X)
    state = torch.get_rng_state()
    rep_plugin.export_int8(net, tmp_path / "net.onnx", X, **QUICK, min_agreement=0.0)
    assert torch.equal(state, torch.get_rng_state()) and not capsys.readouterr().out
