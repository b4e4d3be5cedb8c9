# The sparse MobileNetV3 of slim_mobilenetv3_fashion_mnist.py, pruned once and fine-tuned with the dense one as teacher.
_base_ = ["./slim_mobilenetv3_fashion_mnist.py"]

load_from = "work_dirs/slim_mobilenetv3_fashion_mnist/epoch_6.pth"
optim_wrapper = dict(optimizer=dict(lr=1e-3))
train_cfg = dict(max_epochs=3)

custom_hooks = [
    dict(type="rep_plugin.PruneHook", scores="bn_gamma", prune_fraction=0.5, begin=0),
    dict(type="rep_plugin.DistillHook"),
]
