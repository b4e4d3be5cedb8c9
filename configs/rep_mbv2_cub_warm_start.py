# Rep-MobileNetV2 on CUB-200-2011 from mmpretrain's ImageNet MobileNetV2: stock's network at the first step, its inner
# activations annealed away over the first half, deployed at the end.
_base_ = ["./rep_mbv2_cub.py"]

# Any MobileNetV2 of this width: mmpretrain's (this one); of timm or torchvision, a file with their state dict, no prefix.
pretrained = "https://download.openmmlab.com/mmclassification/v0/mobilenet_v2/mobilenet_v2_batch256_imagenet_20200708-3b2dc3af.pth"
model = dict(
    backbone=dict(anneal=True, init_cfg=dict(type="Pretrained", checkpoint=pretrained, prefix="backbone")),
)

# Of 100 epochs: two to warm up as stock, and the second half to settle in the form that is deployed.
custom_hooks = [
    dict(type="rep_plugin.LinearizeHook", begin=2, end=50, schedule="cosine"),
    dict(type="rep_plugin.ReparamHook"),
]
