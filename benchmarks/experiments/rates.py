# Which learning rate suits which network, before they are compared: stock MobileNetV2 and the all-linear one, one cycle.
title = "Learning rates on Fashion-MNIST: 12,000 images, 6 epochs, one cycle, width 0.5"
baseline = "stock MobileNetV2, 0.05"
seeds = 1
options = {
    "train_dataloader.dataset.indices": 12000,
    "default_hooks.logger.interval": 20,
    "train_cfg.max_epochs": 6,
    "train_cfg.val_interval": 6,
}


def row(config, rate):
    cycle = dict(
        type="OneCycleLR", eta_max=rate, pct_start=0.2, by_epoch=True, convert_to_iter_based=True, _delete_=True
    )
    return dict(config=config, options={"param_scheduler": cycle})


rows = {
    f"{name}, {rate}": row(config, rate)
    for rate in (0.02, 0.05, 0.1)
    for name, config in (
        ("stock MobileNetV2", "mobilenetv2_fashion_mnist"),
        ("all blocks linear", "rep_mbv2_fashion_mnist"),
    )
}
claims = [
    dict(
        says="the rate of the other sets suits stock MobileNetV2",
        source="our aim",
        better="stock MobileNetV2, 0.05",
        than="stock MobileNetV2, 0.02",
    )
]
