# Network Slimming of a stock ResNet-18 (CIFAR form) on Fashion-MNIST: six epochs with L1 on the gammas, then channels
# are removed until half of the multiply-adds remain, and the narrow network is fine-tuned for six more.
# Pictures: `make fashion-mnist`. At the end: pruned.pth and pruned.py, which stock code loads, and pruned.rounds.json.
_base_ = ["mmpretrain::_base_/schedules/cifar10_bs128.py", "mmpretrain::_base_/default_runtime.py"]

missing_data_hint = "fetch the pictures: make fashion-mnist"

model = dict(
    type="ImageClassifier",
    backbone=dict(type="ResNet_CIFAR", depth=18, in_channels=1, stem_channels=32, base_channels=32),
    neck=dict(type="GlobalAveragePooling"),
    head=dict(
        type="LinearClsHead",
        num_classes=10,
        in_channels=256,
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

# mmpretrain's CIFAR-10 optimizer; the rate falls over the twelve epochs along a cosine.
param_scheduler = dict(_delete_=True, type="CosineAnnealingLR", by_epoch=True, convert_to_iter_based=True)
train_cfg = dict(max_epochs=12)

custom_hooks = [
    # The last batch norm is pulled harder; none any more once the network is fine-tuned.
    dict(type="rep_plugin.SparsityHook", strength=1e-4, overrides={"backbone.layer4.1.bn2": 1e-3}, warmup=1, end=6),
    dict(type="rep_plugin.PruneHook", macs=0.5, begin=6, min_channels=8, round_to=4),
]
