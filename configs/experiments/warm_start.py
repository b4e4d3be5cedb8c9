# Rep-MobileNetV2 that begins as a trained stock MobileNetV2 and is annealed, against as many epochs from scratch.
# All rows see the same number of images. The annealed network and the one from scratch deploy as the same convolutions.
_base_ = ["./_base_fashion_mnist.py"]

title = "Warm start on Fashion-MNIST: 12,000 images, 12 epochs in all, width 0.5"
baseline = "stock MobileNetV2, one cycle"
options = {"optim_wrapper.optimizer.lr": 0.05}  # stock MobileNetV2 diverges at 0.1

one_cycle = dict(
    type="OneCycleLR", eta_max=0.05, pct_start=0.2, by_epoch=True, convert_to_iter_based=True, _delete_=True
)
stock = "mobilenetv2_fashion_mnist"
half = {"train_cfg.max_epochs": 6, "train_cfg.val_interval": 6}
whole = {"train_cfg.max_epochs": 12, "train_cfg.val_interval": 12}
of_annealed = {
    "model.backbone.anneal": True,
    "custom_hooks": [dict(type="rep_plugin.LinearizeHook", end=3), dict(type="rep_plugin.ReparamHook")],
}
warm_up = {"param_scheduler": one_cycle}
rep = "rep_mbv2_fashion_mnist"

# Quoted with one cycle; the plain cosine screens.
rows = {
    "stock, six epochs, one cycle": dict(config=stock, options={**half, **warm_up}, hidden=True),
    "stock MobileNetV2, one cycle": dict(config=stock, options={**whole, **warm_up}),
    "all blocks linear, from scratch, one cycle": dict(config=rep, options={**whole, **warm_up}),
    "stock, then annealed, one cycle": dict(
        config=rep, options={**of_annealed, **half, **warm_up}, start="stock, six epochs, one cycle"
    ),
    "stock at first, annealed within one cycle": dict(
        config=rep,
        options={
            "model.backbone.anneal": True,
            "custom_hooks": [
                dict(type="rep_plugin.LinearizeHook", begin=4, end=8),
                dict(type="rep_plugin.ReparamHook"),
            ],
            **whole,
            **warm_up,
        },
    ),
    "stock, six epochs": dict(config=stock, options=half, hidden=True),
    "stock MobileNetV2": dict(config=stock, options=whole, seeds=1),
    "all blocks linear, from scratch": dict(config=rep, options=whole, seeds=1),
    "stock, then annealed": dict(config=rep, options={**of_annealed, **half}, start="stock, six epochs", seeds=1),
}
claims = [
    dict(
        says="the way through the stock network is worth three points",
        source="a sketch on one seed",
        better="stock at first, annealed within one cycle",
        than="all blocks linear, from scratch, one cycle",
        by=2.0,
    ),
    dict(
        says="without warm-up too, annealing beats training from scratch",
        source="the same",
        better="stock, then annealed",
        than="all blocks linear, from scratch",
    ),
    dict(
        says="annealed, the merged network is within a point of stock",
        source="the same",
        better="stock at first, annealed within one cycle",
        than="stock MobileNetV2, one cycle",
        by=-1.0,
    ),
]
