# MobileNetV3-small (squeeze-and-excite, h-swish) on CIFAR-10, sparse training, as published in 2019: 30 epochs, batch 100,
# Adam at 2e-3, stepped down as the accuracy passes 80, 87 and 90 % (by an unpublished factor; here 0.5). Then prune and
# fine-tune: slim_mobilenetv3_cifar10_oneshot.py, ..._iterative.py, or all rates and strengths with rep-plugin sweep.
_base_ = ["mmpretrain::mobilenet_v3/mobilenet-v3-small_8xb16_cifar10.py"]

model = dict(backbone=dict(_delete_=True, type="rep_plugin.MobileNetV3_CIFAR", arch="small"))

train_dataloader = dict(batch_size=100)
val_dataloader = dict(batch_size=100)
test_dataloader = val_dataloader

optim_wrapper = dict(optimizer=dict(_delete_=True, type="Adam", lr=2e-3))
param_scheduler = None
train_cfg = dict(by_epoch=True, max_epochs=30, val_interval=1)

custom_hooks = [
    dict(type="rep_plugin.AccuracyLrHook", thresholds=(80.0, 87.0, 90.0), factor=0.5),
    dict(type="rep_plugin.SparsityHook", strength=1e-4, histogram_interval=5),
]
