# The sparse MobileNetV3 of slim_mobilenetv3_cifar10.py, pruned once and fine-tuned. The nine rates of the study:
#   rep-plugin sweep slim_mobilenetv3_cifar10_oneshot \
#     --sparse slim_mobilenetv3_cifar10
_base_ = ["./slim_mobilenetv3_cifar10.py"]

load_from = "work_dirs/slim_mobilenetv3_cifar10/epoch_30.pth"

custom_hooks = [
    dict(type="rep_plugin.AccuracyLrHook", thresholds=(80.0, 87.0, 90.0), factor=0.5),
    dict(type="rep_plugin.PruneHook", scores="bn_gamma", prune_fraction=0.5, begin=0),
]
