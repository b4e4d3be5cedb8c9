# The sparse network of slim_bcnn_vgg16bn_cub.py, pruned in four rounds, L1 going on: of what is left 20, 25, 33 and
# 50 % go, of the whole 20, 40, 60 and 80 %.
_base_ = ["./slim_bcnn_vgg16bn_cub.py"]

load_from = "work_dirs/slim_bcnn_vgg16bn_cub/epoch_60.pth"
train_cfg = dict(max_epochs=200)

custom_hooks = [
    dict(type="rep_plugin.SparsityHook", strength=1e-4),
    dict(type="rep_plugin.PruneHook", fractions=[0.2, 0.25, 0.33, 0.5], begin=0, interval=50),
]
