# Sparse VGG16-BN bilinear networks, pruned in four rounds with L1 going on.
# Of what is left 20, 25, 33 and 50 % go; of the whole that is 20, 40, 60 and 80 %.
_base_ = ["./bcnn_vgg16bn.py"]

train_cfg = dict(max_epochs=200)

custom_hooks = [
    dict(type="rep_plugin.SparsityHook", strength=1e-4),
    dict(type="rep_plugin.PruneHook", scores="bn_gamma", fractions=[0.2, 0.25, 0.33, 0.5], begin=0, interval=50),
]
