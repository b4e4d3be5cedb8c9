# timm's MobileNetV2 in mmpretrain's TIMMBackbone, with timm's ImageNet weights, on CUB-200-2011: trained as it is for half of
# the epochs, then the activations that it can best spare for 0.85 of its time in ONNX Runtime are annealed away.
_base_ = ["../rep_mbv2_cub.py"]

model = dict(backbone=dict(_delete_=True, type="TIMMBackbone", model_name="mobilenetv2_100", pretrained=True))

custom_hooks = [
    dict(type="rep_plugin.LinearizeHook", begin=50, end=80, latency=0.85, runtime="onnxruntime", act_after="relu6"),
    dict(type="rep_plugin.ReparamHook"),
]
