# MobileNetV3-small slimmed: sparse training, nine rates in one shot, other strengths of L1, and iterative pruning.
_base_ = ["./_base_fashion_mnist.py"]

title = "MobileNetV3-small slimmed on Fashion-MNIST: 12,000 images, 6 sparse epochs and 3 of fine-tuning"
baseline = "dense, nine epochs"

sparse = "slim_mobilenetv3_fashion_mnist"
one_shot, iterative = f"{sparse}_oneshot", f"{sparse}_iterative"
strength, fraction = "custom_hooks.1.strength", "custom_hooks.0.prune_fraction"
dense = {
    "custom_hooks": [dict(type="rep_plugin.AccuracyLrHook", thresholds=(80.0, 87.0, 90.0), factor=0.5)],
    "train_cfg.max_epochs": 9,
}
rows = {"dense, nine epochs": dict(config=sparse, options=dense)}
rows.update(
    {
        f"sparse, L1 {l1}, six epochs": dict(config=sparse, options={strength: float(l1)}, seeds=1)
        for l1 in ("1e-4", "1e-3", "1e-2")
    }
)
rows.update(
    {
        f"{rate} % of the channels, L1 1e-3": dict(
            config=one_shot,
            options={fraction: rate / 100},
            start="sparse, L1 1e-3, six epochs",
            seeds=3 if rate in (40, 80) else 1,
        )
        for rate in range(10, 100, 10)
    }
)
rows.update(
    {
        f"{rate} % of the channels, L1 {l1}": dict(
            config=one_shot, options={fraction: rate / 100}, start=f"sparse, L1 {l1}, six epochs", seeds=1
        )
        for rate in (40, 80)
        for l1 in ("1e-4", "1e-2")
    }
)
rows.update(
    {
        f"{rate} % of the channels, L1 1e-3, iterative": dict(
            config=iterative,
            options={fraction: rate / 100},
            start="sparse, L1 1e-3, six epochs",
            seeds=3 if rate == 80 else 1,
        )
        for rate in (40, 80)
    }
)
claims = [
    dict(
        says="without 40 % of its channels the network is as accurate as before",
        source="the study on MobileNetV3, 2019",
        better="40 % of the channels, L1 1e-3",
        than="dense, nine epochs",
        by=-0.5,
    ),
    dict(
        says="40 % is better than 80 %",
        source="the same",
        better="40 % of the channels, L1 1e-3",
        than="80 % of the channels, L1 1e-3",
    ),
    dict(
        says="iterative pruning is better than one shot",
        source="the same",
        better="80 % of the channels, L1 1e-3, iterative",
        than="80 % of the channels, L1 1e-3",
    ),
]
