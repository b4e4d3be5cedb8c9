# What all slimming configs share, without hooks: a stock ResNet-18 of 16 to 128 channels (14.1 million multiply-adds) on
# 12,000 images of Fashion-MNIST, ten epochs under one cosine. A step of 128 images takes about 0.1 s on one core, a
# run two minutes. All 60,000 images: train_dataloader.dataset.indices=None. Data: `make fashion-mnist`.
_base_ = ["../rep_mbv2_fashion_mnist.py"]  # its data, and its learning rate's cosine over all epochs

model = dict(
    backbone=dict(
        _delete_=True,
        type="ResNet_CIFAR",
        depth=18,
        in_channels=1,
        stem_channels=16,
        base_channels=16,
        strides=(2, 2, 2, 1),
    ),
    head=dict(in_channels=128),
)

train_dataloader = dict(dataset=dict(indices=12000))
train_cfg = dict(max_epochs=10, val_interval=5)

custom_hooks = []
