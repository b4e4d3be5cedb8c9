# The sparse network of slim_bcnn_rep_mbv2_mini_cub.py, pruned once, fine-tuned with the dense one as teacher, merged.
_base_ = ["./slim_bcnn_rep_mbv2_mini_cub.py"]

load_from = "work_dirs/slim_bcnn_rep_mbv2_mini_cub/epoch_10.pth"
optim_wrapper = dict(optimizer=dict(lr=0.02))
param_scheduler = dict(_delete_=True, type="CosineAnnealingLR", by_epoch=True, convert_to_iter_based=True)
train_cfg = dict(max_epochs=4)

custom_hooks = [
    dict(type="rep_plugin.PruneHook", scores="bn_gamma", prune_fraction=0.4, begin=0, min_channels=4),
    dict(type="rep_plugin.DistillHook"),
    dict(type="rep_plugin.ReparamHook"),
]
