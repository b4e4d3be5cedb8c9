# Rep-MobileNetV2 on the small rendered birds (rep-plugin script make_mini_fgvc.py):
# CUB's layout and loader, small images, a schedule that fits two CPU cores.
_base_ = ["./rep_mbv2_cub.py"]

missing_data_hint = {"data/mini_cub": "render it: rep-plugin script make_mini_fgvc.py --out data/mini_cub"}

# RepVGG's branches: a step takes about 60 % of the time of the default ones (bottleneck, identity), and what is deployed is
# the same network.
branches = ("conv3x3", "conv1x1", "identity")
model = dict(
    backbone=dict(widen_factor=0.5, strides=(2, 1, 2, 2, 2, 1, 1, 1), branches=branches, channels_last=True),
    head=dict(num_classes=20, topk=(1,)),
)
data_preprocessor = dict(num_classes=20)

# The birds reach the borders of their images: nothing is cropped away in validation, and little in training.
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=96),
    dict(type="RandomCrop", crop_size=96, padding=6, padding_mode="edge"),
    dict(type="RandomFlip", prob=0.5, direction="horizontal"),
    dict(type="PackInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=96),
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
# Warm-up and averaged weights, so that another order of sums (threads, processor) moves top-1 less.
param_scheduler = dict(
    type="OneCycleLR", eta_max=0.1, pct_start=0.1, by_epoch=True, convert_to_iter_based=True, _delete_=True
)
train_cfg = dict(max_epochs=16, val_interval=4)
default_hooks = dict(checkpoint=dict(interval=1, max_keep_ckpts=2), logger=dict(interval=25))
# The average follows the weights closely at first, over the last 40 steps or so at the end; ReparamHook merges the average.
custom_hooks = [
    dict(type="EMAHook", ema_type="MomentumAnnealingEMA", momentum=0.01, gamma=25, update_buffers=True),
    dict(type="rep_plugin.ReparamHook"),
]
randomness = dict(seed=0)
