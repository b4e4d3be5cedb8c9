# Removal without loss: ResRep and Centripetal SGD against the dense network, for ten epochs and for twenty.
title = "Centripetal SGD and ResRep: a ResNet-18 of 16 to 128 channels, half of the multiply-adds, Fashion-MNIST"
baseline = "dense, 10 epochs"
options = {"default_hooks.logger.interval": 20}

dense, csgd, resrep = (f"{name}_resnet18_fashion_mnist" for name in ("slim", "csgd", "resrep"))
once = {"train_cfg.val_interval": 10}
twice = {"train_cfg.max_epochs": 20, "train_cfg.val_interval": 20}
rows = {
    "dense, 10 epochs": dict(config=dense, options={**once, "custom_hooks": []}),
    "Centripetal SGD, 10 epochs": dict(config=csgd, options=once),
    "ResRep, 10 epochs": dict(config=resrep, options=once),
    "dense, 20 epochs": dict(config=dense, options={**twice, "custom_hooks": []}, seeds=1),
    # Filters come together with the sum of the learning rates, which is twice as large.
    "Centripetal SGD, 20 epochs": dict(config=csgd, options={**twice, "custom_hooks.0.strength": 0.015}, seeds=1),
    "ResRep, 20 epochs": dict(config=resrep, options={**twice, "custom_hooks.0.end": 8}, seeds=1),
}
claims = [
    dict(
        says=f"{method} loses nothing against the dense network",
        source=source,
        better=f"{method}, {epochs} epochs",
        than=f"dense, {epochs} epochs",
        by=-0.2,
    )
    for method, source in (
        ("Centripetal SGD", "Ding et al., CVPR 2019"),
        ("ResRep", "Ding et al., ICCV 2021"),
    )
    for epochs in (10, 20)
]
