# Stock MobileNetV2 on Fashion-MNIST, shortened while it trains: six epochs as it is, then the activations that it can best
# spare for 0.85 of its time in ONNX Runtime are annealed away over four, then two more. Data: `make fashion-mnist`.
_base_ = ["../_base_/mobilenetv2_fashion_mnist.py"]

train_cfg = dict(max_epochs=12)

custom_hooks = [
    dict(type="rep_plugin.LinearizeHook", begin=6, end=10, latency=0.85, runtime="onnxruntime", act_after="relu6"),
    dict(type="rep_plugin.ReparamHook"),
]
