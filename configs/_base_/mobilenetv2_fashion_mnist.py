# Stock MobileNetV2 0.5 under the schedule of rep_mbv2_fashion_mnist.py, with the strides that suit 28 pixels: what depth
# compression begins with, and what experiments compare with. Data: `make fashion-mnist`.
_base_ = ["../rep_mbv2_fashion_mnist.py"]

model = dict(
    backbone=dict(
        _delete_=True,
        type="rep_plugin.MobileNetV2_CIFAR",
        widen_factor=0.5,
        in_channels=1,
        strides=(1, 1, 2, 2, 2, 1, 2, 1),
        channels_last=True,
    )
)
custom_hooks = []
