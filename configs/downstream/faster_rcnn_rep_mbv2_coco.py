# Faster R-CNN on COCO with Rep-MobileNetV2: mmdet's own data set, schedule, neck and heads, unchanged.
_base_ = ["mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py"]

model = dict(
    backbone=dict(_delete_=True, type="rep_plugin.RepMobileNetV2", widen_factor=1.0, out_indices=(1, 2, 4, 6)),
    neck=dict(in_channels=[24, 32, 96, 320]),
)

custom_hooks = [dict(type="rep_plugin.ReparamHook")]
