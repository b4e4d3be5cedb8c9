#!/usr/bin/env python
"""Deployed Rep-MobileNetV2 against stock MobileNetV2 with its BN folded: one thread, batch 1, interleaved, medians.

Eager PyTorch in both memory formats, ONNX Runtime and OpenVINO (needs ``pip install -e '.[export]'``). Also prints costs,
equality of the deployed model at 224 and 225 pixels, and the seconds of merging.
"""

import argparse
import time
from functools import partial

import timm
import torch
from common import add_record, make_table, write_table
from rich.console import Console
from torch import nn

import rep_plugin
from rep_plugin.export.export_onnx import OPSET
from rep_plugin.export.graph import to_onnx
from rep_plugin.export.inputs import INPUT, feed_of
from rep_plugin.export.runtimes import open_model
from rep_plugin.measure.costs import count_macs, count_params
from rep_plugin.measure.latency import eager_calls, interleaved_medians, torch_threads
from rep_plugin.measure.verify import compare_outputs
from rep_plugin.testing import calibrate_random_bn_


def runtime_calls(models: dict[str, nn.Module], x: torch.Tensor) -> dict[str, dict]:
    """Calls of every model in ONNX Runtime and OpenVINO, one thread and float32 each."""
    dims = {INPUT: {}, "logits": {}}
    graphs = {
        name: to_onnx(model, feed_of(model, x), {"logits": tuple(model(x).shape)}, dims, OPSET, False).proto
        for name, model in models.items()
    }
    calls = {}
    for runtime, title in (("onnxruntime", "ONNX Runtime"), ("openvino", "OpenVINO")):
        sessions = {name: open_model(runtime, graph.SerializeToString(), 1) for name, graph in graphs.items()}
        calls[title] = {name: partial(session, {INPUT: x}) for name, session in sessions.items()}
    return calls


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", default="100", choices=["050", "075", "100", "140"], help="width of both networks")
    parser.add_argument("--size", type=int, default=224, help="side of the image in pixels")
    parser.add_argument("--rounds", type=int, default=100, help="timed calls of each contender")
    add_record(parser)
    args = parser.parse_args()
    console, size = Console(), args.size
    torch.manual_seed(0)

    ours, stock = f"rep_mobilenetv2_{args.width}", f"mobilenetv2_{args.width}"
    trained = calibrate_random_bn_(timm.create_model(ours), torch.randn(8, 3, 96, 96))
    x = torch.randn(1, 3, size, size)
    started = time.perf_counter()
    rep_plugin.reparameterize(trained, x, verify=False)
    merge_seconds = time.perf_counter() - started
    deployed, report = rep_plugin.reparameterize(trained, x)
    folded, _ = rep_plugin.reparameterize(calibrate_random_bn_(timm.create_model(stock), torch.randn(8, 3, 96, 96)), x)
    models = {ours: deployed, stock: folded}

    costs = make_table(f"costs at {size}x{size}, 1000 classes", ("model", "params", "MACs"))
    for name, model in (("trained form", trained), *models.items()):
        costs.add_row(name, f"{count_params(model):,}", f"{count_macs(model, x):,}")
    console.print(costs)

    title = "deployed against trained form, random weights and BN"
    equal = make_table(title, ("size", "float64 max rel", "border", "interior", "float32 max rel"))
    for side in (size, size + 1):
        batch = torch.randn(2, 3, side, side)
        _, proof = rep_plugin.reparameterize(trained, batch)
        with torch.no_grad():
            single = compare_outputs(trained.forward_features(batch), deployed.forward_features(batch))
        cells = (proof.max_rel_error, proof.border_rel_error, proof.interior_rel_error, single.max_rel)
        equal.add_row(str(side), *(f"{value:.1e}" for value in cells))
    console.print(equal)
    console.print(f"merge {merge_seconds:.2f} s, merge and proof {report.seconds:.2f} s")

    title = f"milliseconds, one thread, batch 1, {size}x{size}, {args.rounds} interleaved rounds"
    latency = make_table(title, ("runtime", ours, f"{stock}, BN folded", "times faster"))
    with torch_threads(1):
        calls = {"eager PyTorch": eager_calls(models, x)}
        calls["eager, channels_last"] = eager_calls(models, x.contiguous(memory_format=torch.channels_last))
        calls |= runtime_calls(models, x)
        for runtime, contenders in calls.items():
            medians = interleaved_medians(contenders, args.rounds)
            ratio = medians[stock] / medians[ours]
            latency.add_row(runtime, *(f"{medians[name] * 1e3:.2f}" for name in models), f"{ratio:.2f}")
    console.print(latency)
    if args.record:
        write_table(latency, "latency")


if __name__ == "__main__":
    main()
