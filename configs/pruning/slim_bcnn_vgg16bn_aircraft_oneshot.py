# The sparse network of slim_bcnn_vgg16bn_aircraft.py, pruned once and fine-tuned, L1 going on. 20, 40, 60 and 80 %:
#   python tools/sweep.py configs/pruning/slim_bcnn_vgg16bn_aircraft_oneshot.py --rates 0.2 0.4 0.6 0.8
_base_ = ["./slim_bcnn_vgg16bn_aircraft.py"]

load_from = "work_dirs/slim_bcnn_vgg16bn_aircraft/epoch_60.pth"
train_cfg = dict(max_epochs=80)

custom_hooks = [
    dict(type="rep_plugin.SparsityHook", strength=1e-4),
    dict(type="rep_plugin.PruneHook", prune_fraction=0.4, begin=0),
]
