# Torch-Pruning under the very schedule of the slimming configs; needs benchmarks/ on PYTHONPATH. kind: bn_scale, group_norm.
_base_ = ["../../configs/_base_/resnet18_fashion_mnist.py"]

custom_imports = dict(imports=["torch_pruning_hook"], allow_failed_imports=False)
custom_hooks = [dict(type="TorchPruningHook", kind="bn_scale", macs=0.5, begin=6, reg=1e-3)]
