# The sparse network of slim_bcnn_rep_mbv2_mini_cub.py, pruned softly: the weakest channels are set to zero after each epoch
# and may come back; what is zero at the end is removed.
_base_ = ["./slim_bcnn_rep_mbv2_mini_cub_oneshot.py"]

custom_hooks = [
    dict(type="rep_plugin.SparsityHook", strength=1e-3),
    dict(type="rep_plugin.SoftPruneHook", prune_fraction=0.4, scores="bn_gamma", scope="global", min_channels=4),
]
