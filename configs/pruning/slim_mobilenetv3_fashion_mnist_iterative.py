# The sparse MobileNetV3 of slim_mobilenetv3_fashion_mnist.py, pruned in three rounds: prune, train sparse again, and so
# on; the last round is fine-tuned without L1.
_base_ = ["./slim_mobilenetv3_fashion_mnist.py"]

load_from = "work_dirs/slim_mobilenetv3_fashion_mnist/epoch_6.pth"
optim_wrapper = dict(optimizer=dict(lr=1e-3))

custom_hooks = [
    dict(type="rep_plugin.SparsityHook", strength=1e-3, end=4, histogram_interval=2),
    dict(type="rep_plugin.PruneHook", scores="bn_gamma", prune_fraction=0.6, begin=0, interval=2, rounds=3),
]
