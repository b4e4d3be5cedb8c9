# Rep-MobileNetV2 on Fashion-MNIST (28x28, one channel), with mmpretrain's own loader. Data: `make fashion-mnist`.
_base_ = ["mmpretrain::_base_/schedules/cifar10_bs128.py", "mmpretrain::_base_/default_runtime.py"]

missing_data_hint = {
    "data/fashion_mnist": (
        "put its four files into data/fashion_mnist/, unpacked (Debian: apt-get install dataset-fashion-mnist; "
        "in a checkout: make fashion-mnist)"
    )
}

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
    dataset=dict(
        type="FashionMNIST",
        data_root="data/fashion_mnist",
        split="test",
        test_mode=True,  # mmpretrain reads the training images without it, whatever split is
        pipeline=[dict(type="PackInputs")],
    ),
    sampler=dict(type="DefaultSampler", shuffle=False),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="Accuracy", topk=(1,))
test_evaluator = val_evaluator

# mmpretrain's CIFAR-10 optimizer; the rate falls over the ten epochs along a cosine.
param_scheduler = dict(_delete_=True, type="CosineAnnealingLR", by_epoch=True, convert_to_iter_based=True)
train_cfg = dict(max_epochs=10)

custom_hooks = [dict(type="rep_plugin.ReparamHook")]
