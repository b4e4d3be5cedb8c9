# Rep-MobileNetV2 on CUB-200-2011: mmpretrain's own data set, schedule and runtime files, unchanged.
_base_ = [
    "mmpretrain::_base_/datasets/cub_bs8_384.py",
    "mmpretrain::_base_/schedules/cub_bs64.py",
    "mmpretrain::_base_/default_runtime.py",
]

missing_data_hint = {
    "data/CUB_200_2011": (
        "put CUB-200-2011 there, or for a trial rendered birds in its layout: "
        "rep-plugin script make_mini_fgvc.py --out data/CUB_200_2011"
    )
}

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
