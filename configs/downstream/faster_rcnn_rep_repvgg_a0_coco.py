# Faster R-CNN on COCO with RepVGG-A0. ImageNet weights of the authors:
#   rep-plugin convert RepVGG-A0-train.pth a0.pth --to rep_plugin_mm
#   --cfg-options model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=a0.pth \
#     model.backbone.init_cfg.prefix=backbone. model.backbone.norm_eval=True model.backbone.frozen_stages=1
_base_ = ["./faster_rcnn_rep_mbv2_coco.py"]

model = dict(
    backbone=dict(_delete_=True, type="rep_plugin.RepVGG", arch="A0", out_indices=(0, 1, 2, 3)),
    neck=dict(in_channels=[48, 96, 192, 1280]),
)
