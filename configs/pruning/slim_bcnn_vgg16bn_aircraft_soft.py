# The sparse network of slim_bcnn_vgg16bn_aircraft.py, pruned softly: after each epoch the lowest gammas of all layers, and
# their betas, are set to zero and train on; what is zero at the end is removed. The study gave 20, 40, 60 and 80 % 50, 100,
# 150 and 200 epochs, and at 60 % zeroed after every third:
#   python tools/sweep.py configs/pruning/slim_bcnn_vgg16bn_aircraft_soft.py --rates 0.6 --cfg-options train_cfg.max_epochs=150 \
#     custom_hooks.1.interval=3
_base_ = ["./slim_bcnn_vgg16bn_aircraft.py"]

load_from = "work_dirs/slim_bcnn_vgg16bn_aircraft/epoch_60.pth"
param_scheduler = dict(patience=10)
train_cfg = dict(max_epochs=100)

custom_hooks = [
    dict(type="rep_plugin.SparsityHook", strength=1e-4),
    dict(type="rep_plugin.SoftPruneHook", prune_fraction=0.4, scores="bn_gamma", scope="global", evaluate=False),
]
