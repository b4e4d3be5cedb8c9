# Sparse VGG16-BN bilinear networks, pruned once and fine-tuned with L1 going on.
_base_ = ["./bcnn_vgg16bn.py"]

train_cfg = dict(max_epochs=80)

custom_hooks = [
    dict(type="rep_plugin.SparsityHook", strength=1e-4),
    dict(type="rep_plugin.PruneHook", scores="bn_gamma", prune_fraction=0.4, begin=0),
]
