# The sparse network of slim_bcnn_rep_mbv2_mini_cub.py, pruned in three rounds with L1 going on, fine-tuned, merged.
_base_ = ["./slim_bcnn_rep_mbv2_mini_cub_oneshot.py"]

train_cfg = dict(max_epochs=5)

custom_hooks = [
    dict(type="rep_plugin.SparsityHook", strength=1e-3, end=2),
    dict(
        type="rep_plugin.PruneHook",
        scores="bn_gamma",
        prune_fraction=0.4,
        begin=0,
        interval=1,
        rounds=3,
        min_channels=4,
    ),
    dict(type="rep_plugin.DistillHook"),
    dict(type="rep_plugin.ReparamHook"),
]
