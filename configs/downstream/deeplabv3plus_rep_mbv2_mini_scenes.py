# DeepLabV3+ with a narrow Rep-MobileNetV2 on small drawn scenes (rep-plugin script make_mini_scenes.py).
_base_ = ["./deeplabv3plus_rep_mbv2_cityscapes.py"]

missing_data_hint = {"data/mini_scenes": "draw it: rep-plugin script make_mini_scenes.py --out data/mini_scenes"}

crop_size = (128, 128)
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(widen_factor=0.5),
    decode_head=dict(in_channels=160, channels=64, c1_in_channels=16, c1_channels=16, num_classes=4),
    auxiliary_head=dict(in_channels=48, channels=32, num_classes=4),
)

classes = ("background", "disk", "box", "triangle")
palette = [[0, 0, 0], [220, 60, 60], [60, 180, 75], [60, 90, 220]]
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackSegInputs"),
]
test_pipeline = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations"), dict(type="PackSegInputs")]
scenes = dict(
    _delete_=True, type="BaseSegDataset", data_root="data/mini_scenes", metainfo=dict(classes=classes, palette=palette)
)
train_dataloader = dict(
    batch_size=8,
    num_workers=1,
    dataset=dict(
        **scenes, data_prefix=dict(img_path="train2017", seg_map_path="masks/train2017"), pipeline=train_pipeline
    ),
)
val_dataloader = dict(
    num_workers=1,
    dataset=dict(**scenes, data_prefix=dict(img_path="val2017", seg_map_path="masks/val2017"), pipeline=test_pipeline),
)
test_dataloader = val_dataloader

optim_wrapper = dict(optimizer=dict(lr=0.02))
param_scheduler = [dict(type="PolyLR", eta_min=1e-4, power=0.9, begin=0, end=600, by_epoch=False)]
train_cfg = dict(max_iters=600, val_interval=100)
default_hooks = dict(logger=dict(interval=25), checkpoint=dict(interval=100, max_keep_ckpts=2))
randomness = dict(seed=0)
