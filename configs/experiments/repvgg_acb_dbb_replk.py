# Branches in one network: a ResNet-18 whose 3x3 convolutions train as RepVGG's, asymmetric or diverse branches, and a
# network of large kernels with and without the small kernel beside them. Merged, the rows of a network are the same.
title = "RepVGG, ACB, DBB and large kernels on Fashion-MNIST: 12,000 images, 10 epochs"
baseline = "ResNet-18, plain"
seeds = 1
options = {"default_hooks.logger.interval": 20, "train_cfg.val_interval": 10, "train_cfg.max_epochs": 10}

network = "slim_resnet18_fashion_mnist"
merge = dict(type="rep_plugin.ReparamHook")


def branches(**conv):
    return dict(config=network, options={"model.backbone.conv_cfg": conv, "custom_hooks": [merge]})


rows = {
    "ResNet-18, plain": dict(config=network, options={"custom_hooks": []}),
    "ResNet-18, RepVGG's branches": branches(type="rep_plugin.RepConv2d"),
    "ResNet-18, ACB": branches(type="rep_plugin.ACBConv2d"),
    "ResNet-18, DBB": branches(type="rep_plugin.DBBConv2d"),
    "ResNet-18, DBB online": branches(type="rep_plugin.DBBConv2d", online=True),
}
claims = [
    dict(
        says=f"{name} trains a better network",
        source=source,
        better=f"ResNet-18, {row}",
        than="ResNet-18, plain",
    )
    for name, row, source in (
        ("the asymmetric block", "ACB", "Ding et al., ICCV 2019"),
        ("the diverse branch block", "DBB", "Ding et al., CVPR 2021"),
    )
]
