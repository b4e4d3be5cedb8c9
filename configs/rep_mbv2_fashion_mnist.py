# Rep-MobileNetV2 on Fashion-MNIST (28x28, one channel), with mmpretrain's own loader. Pictures: `make fashion-mnist`.
_base_ = ["mmpretrain::_base_/default_runtime.py"]

missing_data_hint = "fetch the pictures: make fashion-mnist"

model = dict(
    type="ImageClassifier",
    backbone=dict(
        type="rep_plugin.RepMobileNetV2",
        widen_factor=0.5,
        in_channels=1,
        strides=(1, 1, 2, 2, 2, 1, 2, 1),
        channels_last=True,
    ),
    neck=dict(type="GlobalAveragePooling"),
    head=dict(
        type="LinearClsHead",
        num_classes=10,
        in_channels=1280,
        loss=dict(type="CrossEntropyLoss", loss_weight=1.0),
        topk=(1,),
    ),
)
data_preprocessor = dict(mean=[72.94], std=[90.02], num_classes=10)

train_pipeline = [
    dict(type="RandomCrop", crop_size=28, padding=2),
    dict(type="RandomFlip", prob=0.5, direction="horizontal"),
    dict(type="PackInputs"),
]
train_dataloader = dict(
    batch_size=128,
    num_workers=1,
    dataset=dict(type="FashionMNIST", data_root="data/fashion_mnist", split="train", pipeline=train_pipeline),
    sampler=dict(type="DefaultSampler", shuffle=True),
)
val_dataloader = dict(
    batch_size=250,
    num_workers=1,
    dataset=dict(type="FashionMNIST", data_root="data/fashion_mnist", split="test", pipeline=[dict(type="PackInputs")]),
    sampler=dict(type="DefaultSampler", shuffle=False),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="Accuracy", topk=(1,))
test_evaluator = val_evaluator

optim_wrapper = dict(
    optimizer=dict(type="SGD", lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True),
    paramwise_cfg=dict(norm_decay_mult=0.0),
)
param_scheduler = dict(type="OneCycleLR", eta_max=0.1, pct_start=0.2, by_epoch=True, convert_to_iter_based=True)
train_cfg = dict(by_epoch=True, max_epochs=10, val_interval=1)
val_cfg = dict()
test_cfg = dict()

custom_hooks = [dict(type="rep_plugin.ReparamHook")]
