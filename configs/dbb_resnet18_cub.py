# ResNet-18 with Diverse Branch Blocks on CUB-200-2011: mmpretrain's own ResNet, one key changed. Merged after training,
# it is the stock ResNet-18 again: deploy.py says conv_cfg=dict(type="Conv2d").
_base_ = [
    "mmpretrain::_base_/datasets/cub_bs8_384.py",
    "mmpretrain::_base_/schedules/cub_bs64.py",
    "mmpretrain::_base_/default_runtime.py",
]

missing_data_hint = (
    "put CUB-200-2011 there, or render the small data set: python tools/make_mini_fgvc.py, "
    "and train configs/rep_mbv2_mini_cub.py"
)

model = dict(
    type="ImageClassifier",
    backbone=dict(type="ResNet", depth=18, conv_cfg=dict(type="rep_plugin.DBBConv2d")),  # or ACBConv2d, RepConv2d
    neck=dict(type="GlobalAveragePooling"),
    head=dict(
        type="LinearClsHead",
        num_classes=200,
        in_channels=512,
        loss=dict(type="CrossEntropyLoss", loss_weight=1.0),
        topk=(1, 5),
    ),
)

custom_hooks = [dict(type="rep_plugin.ReparamHook")]
