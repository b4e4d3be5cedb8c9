# Rep-MobileNetV2's branches: sets of branches, their online form, and the same deployed network trained without any.
# All but stock MobileNetV2 deploy as the same 3x3 convolutions.
_base_ = ["./_base_fashion_mnist.py"]

title = "Branches of Rep-MobileNetV2 on Fashion-MNIST: 12,000 images, 6 epochs, width 0.5"
baseline = "plain 3x3"
options = {"optim_wrapper.optimizer.lr": 0.05}  # stock MobileNetV2 diverges at 0.1

rep = "rep_mbv2_fashion_mnist"
epochs = {"train_cfg.max_epochs": 6, "train_cfg.val_interval": 6}
one_cycle = dict(
    type="OneCycleLR", eta_max=0.05, pct_start=0.2, by_epoch=True, convert_to_iter_based=True, _delete_=True
)
warm_up = {"param_scheduler": one_cycle}
stock = "mobilenetv2_fashion_mnist"
forms = {
    "bottleneck, identity (the default)": {"model.backbone.branches": ("bottleneck", "identity")},
    "the default, online": {"model.backbone.online": True},
    "plain 3x3": {"model.backbone.branches": ("conv3x3",)},
    "bottleneck, conv3x3, identity": {"model.backbone.branches": ("bottleneck", "conv3x3", "identity")},
    "conv3x3, conv1x1, identity (RepVGG's)": {"model.backbone.branches": ("conv3x3", "conv1x1", "identity")},
    "bottleneck, conv3x3, identity, avgpool": {
        "model.backbone.branches": ("bottleneck", "conv3x3", "identity", "avgpool")
    },
    "stock MobileNetV2": {},
}
configs = {name: stock if name.startswith("stock") else rep for name in forms}
quoted = ("bottleneck, identity (the default)", "plain 3x3")
rows = {
    name: dict(config=configs[name], options={**form, **epochs}, seeds=3 if name in quoted else 1)
    for name, form in forms.items()
}
rows.update(
    {
        f"{name}, one cycle": dict(
            config=configs[name],
            options={**form, **epochs, **warm_up},
            seeds=3 if name in (*quoted, "the default, online", "stock MobileNetV2") else 1,
        )
        for name, form in forms.items()
    }
)
claims = [
    dict(
        says="linear branches are worth about one point",
        source="the thesis on Rep-MobileNetV2, 2023",
        better="bottleneck, identity (the default)",
        than="plain 3x3",
        by=0.5,
    ),
    dict(
        says="with warm-up too",
        source="the same",
        better="bottleneck, identity (the default), one cycle",
        than="plain 3x3, one cycle",
        by=0.5,
    ),
    dict(
        says="the merged network is at least as accurate as stock MobileNetV2",
        source="the same",
        better="bottleneck, identity (the default), one cycle",
        than="stock MobileNetV2, one cycle",
    ),
]
