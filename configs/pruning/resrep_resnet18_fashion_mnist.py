# ResRep of the network and schedule of Network Slimming beside it: compactors learn for all epochs which channels can go,
# rows are marked from the first to the fourth until half of the multiply-adds remain, and have shrunk to zero long before
# the end, where they are dropped without fine-tuning. Data: `make fashion-mnist`.
# At the end: pruned.pth and pruned.py, which stock code loads, and pruned.rounds.json.
_base_ = ["./slim_resnet18_fashion_mnist.py"]

custom_hooks = [
    # The paper pulls all rows by 1e-4 for 480 epochs of CIFAR-10; in so few epochs marked rows need more to get to zero.
    dict(
        type="rep_plugin.ResRepHook",
        macs=0.5,
        begin=1,
        end=4,
        interval=25,
        strength=1e-4,
        marked_strength=1.5e-3,
        min_channels=4,
        round_to=4,
    ),
]
