# Bilinear Rep-MobileNetV2 on the rendered birds: 20 classes, 128 x 128, from scratch (draw them:
# rep-plugin script make_mini_fgvc.py).
_base_ = ["mmpretrain::_base_/default_runtime.py"]

data_root = "data/mini_cub"
missing_data_hint = {data_root: "render it: rep-plugin script make_mini_fgvc.py --out data/mini_cub"}

model = dict(
    type="ImageClassifier",
    # Stride 16: an 8 x 8 map, since the birds differ in small parts. The last stage (160 channels), not the last
    # convolution (1280): it needs no projection, which would have to be learned from nothing.
    backbone=dict(
        type="rep_plugin.RepMobileNetV2",
        widen_factor=0.5,
        strides=(2, 1, 2, 2, 2, 1, 1, 1),
        out_indices=(6,),
        channels_last=True,
    ),
    head=dict(
        type="rep_plugin.BilinearClsHead",
        in_channels=160,
        method="isqrt_cov",
        num_classes=20,
        loss=dict(type="CrossEntropyLoss", loss_weight=1.0),
        topk=(1,),
    ),
)
data_preprocessor = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True, num_classes=20)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="RandomCrop", crop_size=128, padding=8, padding_mode="edge"),
    dict(type="RandomFlip", prob=0.5, direction="horizontal"),
    dict(type="PackInputs"),
]
test_pipeline = [dict(type="LoadImageFromFile"), dict(type="PackInputs")]
train_dataloader = dict(
    batch_size=32,
    num_workers=1,
    dataset=dict(type="CUB", data_root=data_root, split="train", pipeline=train_pipeline),
    sampler=dict(type="DefaultSampler", shuffle=True),
)
val_dataloader = dict(
    batch_size=100,
    num_workers=1,
    dataset=dict(type="CUB", data_root=data_root, split="test", test_mode=True, pipeline=test_pipeline),
    sampler=dict(type="DefaultSampler", shuffle=False),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="Accuracy", topk=(1,))
test_evaluator = val_evaluator

# The matrix square root trains faster than the signed one of method="full", whose features of unit norm want 20 to 100
# times the rate in the classifier.
optim_wrapper = dict(
    optimizer=dict(type="SGD", lr=0.05, momentum=0.9, weight_decay=1e-4, nesterov=True),
    paramwise_cfg=dict(norm_decay_mult=0.0, custom_keys={"head.fc": dict(lr_mult=5.0)}),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, by_epoch=True, begin=0, end=2, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", T_max=8, by_epoch=True, begin=2, end=10, convert_to_iter_based=True),
]
train_cfg = dict(by_epoch=True, max_epochs=10, val_interval=1)
val_cfg = dict()
test_cfg = dict()

# The backbone's branches and the head's symmetric half are merged when training ends.
custom_hooks = [dict(type="rep_plugin.ReparamHook")]
