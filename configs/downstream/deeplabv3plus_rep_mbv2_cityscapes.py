# DeepLabV3+ on Cityscapes with Rep-MobileNetV2 at output stride 16: mmseg's own data set, schedule and heads.
# The path is spelled out because onedl-mmengine looks for "mmseg::" under the name of the official distribution.
_base_ = [
    __import__("mmseg").__path__[0] + "/.mim/configs/deeplabv3plus/deeplabv3plus_r50-d8_4xb2-80k_cityscapes-512x1024.py"
]

sync_bn = "torch"  # several processes share the statistics of the backbone too, as the heads' SyncBN does

model = dict(
    pretrained=None,
    backbone=dict(_delete_=True, type="rep_plugin.RepMobileNetV2", output_stride=16, out_indices=(1, 2, 4, 6)),
    decode_head=dict(in_channels=320, c1_in_channels=24, dilations=(1, 6, 12, 18)),
    auxiliary_head=dict(in_channels=96),
)

custom_hooks = [dict(type="rep_plugin.ReparamHook")]
