# EfficientNet-Lite0 (inverted residuals, ReLU6, no squeeze-and-excitation), which mmpretrain itself does not have, of timm.
_base_ = ["./depth_timm_mbv2_cub.py"]

model = dict(backbone=dict(model_name="efficientnet_lite0"))
