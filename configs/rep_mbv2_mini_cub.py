# Rep-MobileNetV2 on the small rendered birds (rep-plugin script make_mini_fgvc.py):
# CUB's layout and loader, small images, a schedule that fits two CPU cores.
_base_ = ["./rep_mbv2_cub.py"]

missing_data_hint = "render it: rep-plugin script make_mini_fgvc.py --out data/mini_cub"

model = dict(
    backbone=dict(widen_factor=0.5, strides=(2, 1, 2, 2, 2, 1, 1, 1), channels_last=True),
    head=dict(num_classes=20, topk=(1,)),
)
data_preprocessor = dict(num_classes=20)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="RandomResizedCrop", scale=96, crop_ratio_range=(0.6, 1.0)),
    dict(type="RandomFlip", prob=0.5, direction="horizontal"),
    dict(type="PackInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=112),
    dict(type="CenterCrop", crop_size=96),
    dict(type="PackInputs"),
]
# The loader knows CUB's 200 names; these are the ones of the tool's 20 classes.
classes = [
    "Black_crested_Gold_barred_Streaked_White_tailed_Finch",
    "Black_capped_Gold_barred_Streaked_White_tailed_Finch",
    "Black_capped_One_barred_Streaked_White_tailed_Parrot",
    "Black_capped_One_barred_Speckled_White_tailed_Parrot",
    "One_barred_Speckled_White_tailed_Grosbeak",
    "Two_barred_Speckled_White_tailed_Grosbeak",
    "Black_crested_Gold_barred_Spotted_White_tailed_Kingfisher",
    "Black_crested_Spectacled_Gold_barred_Spotted_White_tailed_Kingfisher",
    "White_capped_Spectacled_Gold_barred_Spotted_Kingfisher",
    "White_capped_Spectacled_Spotted_Kingfisher",
    "White_capped_Spectacled_Wren",
    "Red_crested_Spectacled_Wren",
    "Red_crested_Spectacled_Two_barred_Shrike",
    "Red_capped_Spectacled_Two_barred_Shrike",
    "Red_capped_Spectacled_One_barred_Speckled_Shrike",
    "Red_crested_Spectacled_Streaked_Wren",
    "Red_capped_Two_barred_White_tailed_Grosbeak",
    "Two_barred_Speckled_White_tailed_Finch",
    "Spectacled_Streaked_Parrot",
    "Red_capped_Spectacled_One_barred_Spotted_Shrike",
]
birds = dict(data_root="data/mini_cub", classes=classes)
train_dataloader = dict(batch_size=32, num_workers=1, dataset=dict(**birds, pipeline=train_pipeline))
val_dataloader = dict(batch_size=50, num_workers=1, dataset=dict(**birds, test_mode=True, pipeline=test_pipeline))
test_dataloader = val_dataloader

optim_wrapper = dict(
    optimizer=dict(type="SGD", lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True, _delete_=True),
    paramwise_cfg=dict(norm_decay_mult=0.0),
)
param_scheduler = dict(
    type="OneCycleLR", eta_max=0.1, pct_start=0.2, by_epoch=True, convert_to_iter_based=True, _delete_=True
)
train_cfg = dict(max_epochs=30, val_interval=5)
default_hooks = dict(checkpoint=dict(interval=5, max_keep_ckpts=2), logger=dict(interval=19))
randomness = dict(seed=0)
