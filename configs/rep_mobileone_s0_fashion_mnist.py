# MobileOne-s0 at half width on Fashion-MNIST (28x28, one channel). Data: `make fashion-mnist`.
_base_ = ["./rep_mbv2_fashion_mnist.py"]


model = dict(
    backbone=dict(
        _delete_=True,
        type="rep_plugin.MobileOne",
        arch=dict(widths=(0.375, 0.5, 0.5, 1.0), copies=4, depths=(2, 4, 5, 1)),
        in_channels=1,
        strides=(1, 2, 2, 2, 1),
        channels_last=True,
    ),
    head=dict(in_channels=512),
)
