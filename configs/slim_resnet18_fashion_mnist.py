# Network Slimming of a stock ResNet-18 (CIFAR form) on Fashion-MNIST: six epochs with L1 on the gammas, then channels
# are removed until half of the multiply-adds remain, and the narrow network is fine-tuned for six more.
# Pictures: `make fashion-mnist`. At the end: pruned.pth and pruned.py, which stock code loads, and pruned.rounds.json.
_base_ = ["./rep_mbv2_fashion_mnist.py"]  # its data, and its learning rate's cosine over all epochs

model = dict(
    backbone=dict(_delete_=True, type="ResNet_CIFAR", depth=18, in_channels=1, stem_channels=32, base_channels=32),
    head=dict(in_channels=256),
)

train_cfg = dict(max_epochs=12)

custom_hooks = [
    # The last batch norm is pulled harder; none any more once the network is fine-tuned.
    dict(type="rep_plugin.SparsityHook", strength=1e-4, overrides={"backbone.layer4.1.bn2": 1e-3}, warmup=1, end=6),
    dict(type="rep_plugin.PruneHook", macs=0.5, begin=6, min_channels=8, round_to=4),
]
