# FCOS on COCO with Rep-MobileNetV2: mmdet's own data set, schedule, neck and head, unchanged.
# Needs mmdet and an mmcv with compiled operators (README, "With mmdet and mmseg").
# Start from a classifier that was trained with our configs:
#   --cfg-options model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=epoch_100.pth \
#     model.backbone.init_cfg.prefix=backbone. model.backbone.norm_eval=True
_base_ = ["mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py"]

model = dict(
    data_preprocessor=dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True),
    # Stages at strides 4, 8, 16 and 32; the last 1x1 convolution belongs to classifiers and stays unused.
    backbone=dict(_delete_=True, type="rep_plugin.RepMobileNetV2", widen_factor=1.0, out_indices=(1, 2, 4, 6)),
    neck=dict(in_channels=[24, 32, 96, 320]),
)

custom_hooks = [dict(type="rep_plugin.ReparamHook")]
