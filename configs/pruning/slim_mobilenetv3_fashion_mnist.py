# MobileNetV3-small (squeeze-and-excite, h-swish) on Fashion-MNIST, sparse training: the study of
# slim_mobilenetv3_cifar10.py on images that are at hand (`make fashion-mnist`) and with a schedule that fits two CPU
# cores. All rates and strengths: rep-plugin experiments mbv3_slimming
_base_ = ["../rep_mbv2_fashion_mnist.py"]  # its data

model = dict(
    # The stock momentum of 0.01 is for long schedules: statistics would lag behind.
    backbone=dict(
        _delete_=True,
        type="rep_plugin.MobileNetV3_CIFAR",
        arch="small",
        in_channels=1,
        norm_cfg=dict(type="BN", eps=0.001, momentum=0.1),
    ),
    head=dict(
        _delete_=True,
        type="StackedLinearClsHead",
        num_classes=10,
        in_channels=576,
        mid_channels=[1280],
        act_cfg=dict(type="HSwish"),
        loss=dict(type="CrossEntropyLoss", loss_weight=1.0),
        topk=(1,),
    ),
)
train_dataloader = dict(batch_size=100)

optim_wrapper = dict(optimizer=dict(_delete_=True, type="Adam", lr=2e-3))
param_scheduler = None
train_cfg = dict(max_epochs=6)

custom_hooks = [
    dict(type="rep_plugin.AccuracyLrHook", thresholds=(80.0, 87.0, 90.0), factor=0.5),
    dict(type="rep_plugin.SparsityHook", strength=1e-3, histogram_interval=2),
]
