# FCOS with a narrow Rep-MobileNetV2 on small drawn scenes (rep-plugin script make_mini_scenes.py):
# minutes on two CPU cores.
_base_ = ["./fcos_rep_mbv2_coco.py"]

missing_data_hint = {"data/mini_scenes": "draw it: rep-plugin script make_mini_scenes.py --out data/mini_scenes"}

model = dict(
    backbone=dict(widen_factor=0.5),
    neck=dict(in_channels=[16, 16, 48, 160], out_channels=64),
    bbox_head=dict(num_classes=3, in_channels=64, feat_channels=64, stacked_convs=2),
)

data_root = "data/mini_scenes/"
scenes = dict(data_root=data_root, metainfo=dict(classes=("disk", "box", "triangle")))
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="Resize", scale=(128, 128), keep_ratio=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(128, 128), keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
train_dataloader = dict(batch_size=8, num_workers=1, dataset=dict(**scenes, pipeline=train_pipeline))
val_dataloader = dict(batch_size=4, num_workers=1, dataset=dict(**scenes, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "annotations/instances_val2017.json")
test_evaluator = val_evaluator

optim_wrapper = dict(optimizer=dict(lr=0.02))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=50),
    dict(type="CosineAnnealingLR", by_epoch=True, begin=0, end=24, T_max=24, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=24, val_interval=4)
default_hooks = dict(logger=dict(interval=25), checkpoint=dict(interval=4, max_keep_ckpts=2))
randomness = dict(seed=0)
