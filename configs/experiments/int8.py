# What networks lose in int8: merged ones, with and without the batch norm behind the sum, beside stock and pruned ones, and
# what an epoch of training with the rounding gives back. `--int8` writes the files, and judges and times them.
_base_ = ["./_base_fashion_mnist.py"]

title = "Int8 on Fashion-MNIST: 12,000 images, 6 epochs, then one with the rounding"
baseline = "RepVGG-A0"
seeds = 1

epochs = {"train_cfg.max_epochs": 6, "train_cfg.val_interval": 6}
one_cycle = dict(
    type="OneCycleLR", eta_max=0.05, pct_start=0.2, by_epoch=True, convert_to_iter_based=True, _delete_=True
)
warm_up = {**epochs, "param_scheduler": one_cycle}
rounding = {
    "train_cfg.max_epochs": 1,
    "train_cfg.val_interval": 1,
    "optim_wrapper.optimizer.lr": 0.001,
    "param_scheduler": dict(type="CosineAnnealingLR", by_epoch=True, convert_to_iter_based=True, _delete_=True),
    "custom_hooks": [dict(type="rep_plugin.QATHook", layers=False, min_agreement=0.0)],
}
merge = [dict(type="rep_plugin.ReparamHook")]
rep, slim = "rep_mbv2_fashion_mnist", "flow_resnet18_fashion_mnist"


def repvgg(**options):
    network = dict(type="rep_plugin.RepVGG", arch="A0", in_channels=1, strides=(2, 2, 2, 2, 1), channels_last=True)
    return {"model.backbone": {"_delete_": True, **network, **options}}


networks = {
    "RepVGG-A0": (rep, repvgg()),
    "QARepVGG-A0": (rep, repvgg(post_bn=True)),
    "Rep-MobileNetV2 0.5": (rep, {}),
    "MobileOne-s0, half width": ("rep_mobileone_s0_fashion_mnist", {}),
    "DBB-ResNet-18": (slim, {"model.backbone.conv_cfg": dict(type="rep_plugin.DBBConv2d"), "custom_hooks": merge}),
    "ResNet-18, pruned": (slim, {"custom_hooks.0.begin": 3}),
    "stock MobileNetV2 0.5": ("mobilenetv2_fashion_mnist", {}),
}
rows = {name: dict(config=config, options={**options, **warm_up}) for name, (config, options) in networks.items()}
rows.update(
    {
        f"{name}, trained on": dict(deployed_of=name, options=rounding)
        for name in networks
        if name != "stock MobileNetV2 0.5"
    }
)
rows["stock MobileNetV2 0.5, trained on"] = dict(
    config="mobilenetv2_fashion_mnist", options=rounding, start="stock MobileNetV2 0.5"
)
claims = [
    dict(
        says="the batch norm behind the sum costs little in float",
        source="QARepVGG, 2023",
        better="QARepVGG-A0",
        than="RepVGG-A0",
        by=-0.3,
    )
]
