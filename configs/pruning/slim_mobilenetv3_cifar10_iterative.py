# The sparse MobileNetV3 of slim_mobilenetv3_cifar10.py, pruned in three rounds: prune, train sparse again, and so on; the
# last round is fine-tuned without L1.
_base_ = ["./slim_mobilenetv3_cifar10.py"]

load_from = "work_dirs/slim_mobilenetv3_cifar10/epoch_30.pth"

custom_hooks = [
    dict(type="rep_plugin.AccuracyLrHook", thresholds=(80.0, 87.0, 90.0), factor=0.5),
    dict(type="rep_plugin.SparsityHook", strength=1e-4, end=20),
    dict(type="rep_plugin.PruneHook", scores="bn_gamma", prune_fraction=0.6, begin=0, interval=10, rounds=3),
]
