# As slim_resnet18_fashion_mnist.py, but the channels go in three rounds, after epochs 4, 5 and 6, sparse training between.
_base_ = ["../_base_/resnet18_fashion_mnist.py"]

custom_hooks = [
    dict(type="rep_plugin.SparsityHook", strength=1e-3, overrides={"backbone.layer4.1.bn2": 3e-3}, warmup=1, end=6),
    dict(
        type="rep_plugin.PruneHook",
        scores="bn_gamma",
        macs=0.5,
        begin=4,
        interval=1,
        rounds=3,
        min_channels=4,
        round_to=4,
    ),
]
