# Fine-grained images at 224 x 224, as the published pruning study of VGG16-BN takes them: resized without keeping the aspect,
# rotated, flipped. A data set's file gives the type, the root and the number of classes.
data_preprocessor = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(224, 224)),
    # Uniform in -15..15 degrees.
    dict(type="Rotate", magnitude_range=(0, 15), magnitude_std="inf", prob=1.0, interpolation="bilinear"),
    dict(type="RandomFlip", prob=0.5, direction="horizontal"),
    dict(type="PackInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(224, 224)),
    dict(type="PackInputs"),
]
train_dataloader = dict(
    batch_size=48,
    num_workers=2,
    dataset=dict(pipeline=train_pipeline),
    sampler=dict(type="DefaultSampler", shuffle=True),
)
val_dataloader = dict(
    batch_size=48,
    num_workers=2,
    dataset=dict(pipeline=test_pipeline),
    sampler=dict(type="DefaultSampler", shuffle=False),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="Accuracy", topk=(1, 5))
test_evaluator = val_evaluator
