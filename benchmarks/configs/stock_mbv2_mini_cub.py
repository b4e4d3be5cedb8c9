# Stock MobileNetV2 under the very schedule of configs/rep_mbv2_mini_cub.py, on the same images. There is nothing to merge.
_base_ = ["../../configs/rep_mbv2_mini_cub.py"]

model = dict(backbone=dict(_delete_=True, type="MobileNetV2", widen_factor=0.5))
custom_hooks = [dict(type="EMAHook", ema_type="MomentumAnnealingEMA", momentum=0.01, gamma=25, update_buffers=True)]
