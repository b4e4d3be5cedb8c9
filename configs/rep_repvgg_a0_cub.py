# RepVGG-A0 on CUB-200-2011: mmpretrain's own data set, schedule and runtime files, unchanged.
# Start from ImageNet weights: rep-plugin convert RepVGG-A0-train.pth a0.pth --to rep_plugin_mm
# and add --cfg-options model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=a0.pth \
#     model.backbone.init_cfg.prefix=backbone.
_base_ = ["./rep_mbv2_cub.py"]

model = dict(
    backbone=dict(_delete_=True, type="rep_plugin.RepVGG", arch="A0"),
    head=dict(in_channels=1280),
)
