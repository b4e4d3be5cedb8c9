# ResRep of the network and schedule of Network Slimming beside it: compactors learn for twelve epochs which channels can go,
# rows are marked between the first and the fifth until half of the multiply-adds remain, and have shrunk to nothing at the
# end, where they are dropped without fine-tuning. Pictures: `make fashion-mnist`.
# At the end: pruned.pth and pruned.py, which stock code loads, and pruned.rounds.json.
_base_ = ["./slim_resnet18_fashion_mnist.py"]

custom_hooks = [
    # The paper's strength is 1e-4 for 480 epochs of CIFAR-10; twelve epochs need a stronger pull.
    dict(type="rep_plugin.ResRepHook", macs=0.5, begin=1, end=5, strength=5e-4, min_channels=8, round_to=4),
]
