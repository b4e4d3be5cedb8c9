# Bilinear CNN on VGG16-BN, second step: everything trains. Settings of the published pruning study of this network:
# 224 x 224 without keeping the aspect, rotation, flip, batch 48, SGD with Nesterov momentum, lr x 0.1 on plateau.
_base_ = ["mmpretrain::_base_/default_runtime.py"]

model = dict(
    type="ImageClassifier",
    # with_last_pool=False: the map after the last ReLU, 14 x 14 at this input.
    backbone=dict(
        type="VGG",
        depth=16,
        norm_cfg=dict(type="BN"),
        with_last_pool=False,
        init_cfg=dict(
            type="Pretrained",
            checkpoint=(
                "https://download.openmmlab.com/mmclassification/v0/vgg/vgg16_bn_batch256_imagenet_20210208-7e55cd29.pth"
            ),
            prefix="backbone.",
        ),
    ),
    head=dict(
        type="rep_plugin.BilinearClsHead",
        in_channels=512,
        method="full",
        loss=dict(type="CrossEntropyLoss", loss_weight=1.0),
        topk=(1, 5),
    ),
)

# The head comes trained out of the first step, so that it needs no larger learning rate here.
optim_wrapper = dict(
    optimizer=dict(type="SGD", lr=1e-2, momentum=0.9, nesterov=True, weight_decay=1e-5),
    paramwise_cfg=dict(custom_keys={"head.fc": dict(lr_mult=1.0)}),
)
param_scheduler = dict(
    type="ReduceOnPlateauLR", monitor="accuracy/top1", rule="greater", factor=0.1, patience=5, by_epoch=True
)
train_cfg = dict(by_epoch=True, max_epochs=60, val_interval=1)
val_cfg = dict()
test_cfg = dict()
auto_scale_lr = dict(base_batch_size=48)
