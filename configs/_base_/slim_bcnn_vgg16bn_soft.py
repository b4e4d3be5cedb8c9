# Sparse VGG16-BN bilinear networks, pruned softly: after each epoch the lowest gammas of all layers, and their betas, are
# set to zero and train on. What is zero at the end is removed.
# The study gave 20, 40, 60 and 80 % 50, 100, 150 and 200 epochs; at 60 % it zeroed after every third.
_base_ = ["./bcnn_vgg16bn.py"]

param_scheduler = dict(patience=10)
train_cfg = dict(max_epochs=100)

custom_hooks = [
    dict(type="rep_plugin.SparsityHook", strength=1e-4),
    dict(type="rep_plugin.SoftPruneHook", prune_fraction=0.4, scores="bn_gamma", scope="global", evaluate=False),
]
