# Network Slimming of a stock ResNet-18 on Fashion-MNIST, in one shot: six epochs with L1 on the gammas, then channels are
# removed until half of the multiply-adds remain, and the narrow network is fine-tuned for four more.
# At the end: pruned.pth and pruned.py, which stock code loads, and pruned.rounds.json.
# Network, data and schedule are in _base_; other ways of slimming inherit this file, or _base_, and give custom_hooks.
_base_ = ["../_base_/resnet18_fashion_mnist.py"]

custom_hooks = [
    # The last batch norm is pulled harder; none any more once the network is fine-tuned.
    dict(type="rep_plugin.SparsityHook", strength=1e-3, overrides={"backbone.layer4.1.bn2": 3e-3}, warmup=1, end=6),
    dict(type="rep_plugin.PruneHook", scores="bn_gamma", macs=0.5, begin=6, min_channels=4, round_to=4),
]
