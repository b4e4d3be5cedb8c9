# Soft filter pruning of the same network from scratch: after every epoch the weakest 30 % of the filters of every layer
# (by their L2 norm) is set to zero, and trains on; what is zero after the last one is removed. Nothing is fine-tuned.
_base_ = ["../_base_/resnet18_fashion_mnist.py"]

custom_hooks = [dict(type="rep_plugin.SoftPruneHook", prune_fraction=0.3, min_channels=4)]
