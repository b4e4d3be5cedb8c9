# Stock MobileNetV2 on the small rendered birds, shortened while it trains: eight epochs as it is, then the activations that
# it can best spare for 0.85 of its time in ONNX Runtime are annealed away over five, then three more.
_base_ = ["../rep_mbv2_mini_cub.py"]

model = dict(
    backbone=dict(
        _delete_=True,
        type="rep_plugin.MobileNetV2_CIFAR",
        widen_factor=0.5,
        strides=(2, 1, 2, 2, 2, 1, 1, 1),
        channels_last=True,
    )
)

custom_hooks = [
    dict(type="EMAHook", ema_type="MomentumAnnealingEMA", momentum=0.01, gamma=25, update_buffers=True),
    dict(type="rep_plugin.LinearizeHook", begin=8, end=13, latency=0.85, runtime="onnxruntime", act_after="relu6"),
    dict(type="rep_plugin.ReparamHook"),
]
