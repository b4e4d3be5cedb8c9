# Rep-MobileNetV2 on CUB-200-2011: mmpretrain's own data set, schedule and runtime files, unchanged.
_base_ = [
    "mmpretrain::_base_/datasets/cub_bs8_384.py",
    "mmpretrain::_base_/schedules/cub_bs64.py",
    "mmpretrain::_base_/default_runtime.py",
]

missing_data_hint = (
    "put CUB-200-2011 there, or render the small data set: python tools/dataset_converters/make_mini_fgvc.py, "
    "and train configs/rep_mbv2_mini_cub.py"
)

model = dict(
    type="ImageClassifier",
    backbone=dict(type="rep_plugin.RepMobileNetV2", widen_factor=1.0),
    neck=dict(type="GlobalAveragePooling"),
    head=dict(
        type="LinearClsHead",
        num_classes=200,
        in_channels=1280,
        loss=dict(type="CrossEntropyLoss", loss_weight=1.0),
        topk=(1, 5),
    ),
)

custom_hooks = [dict(type="rep_plugin.ReparamHook")]
