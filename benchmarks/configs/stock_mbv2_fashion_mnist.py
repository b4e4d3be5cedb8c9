# Stock MobileNetV2 under the very schedule of configs/rep_mbv2_fashion_mnist.py; needs benchmarks/ on PYTHONPATH.
_base_ = ["../../configs/rep_mbv2_fashion_mnist.py"]

custom_imports = dict(imports=["small_mobilenet_v2"], allow_failed_imports=False)
model = dict(
    backbone=dict(
        _delete_=True, type="SmallMobileNetV2", widen_factor=0.5, in_channels=1, strides=(1, 1, 2, 2, 2, 1, 2, 1)
    )
)
custom_hooks = []
