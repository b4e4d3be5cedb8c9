# Depth compression against what else makes a trained MobileNetV2 faster, for as many epochs: narrower stock networks, all
# blocks linear, and channel pruning. Latencies are shares of the time of stock's in ONNX Runtime, multiply-adds are chosen to
# come to about the same; `--time` measures what came out.
_base_ = ["./_base_fashion_mnist.py"]

title = "Accuracy against latency of MobileNetV2 0.5 on Fashion-MNIST: 12,000 images, 12 epochs, then 6 of fine-tuning"
baseline = "stock MobileNetV2 0.5"
seeds = 1
options = {"optim_wrapper.optimizer.lr": 0.05}


def cycle(epochs):
    rate = dict(
        type="OneCycleLR", eta_max=0.05, pct_start=0.2, by_epoch=True, convert_to_iter_based=True, _delete_=True
    )
    return {"train_cfg.max_epochs": epochs, "train_cfg.val_interval": epochs, "param_scheduler": rate}


def tune(epochs):
    cosine = dict(type="CosineAnnealingLR", by_epoch=True, convert_to_iter_based=True, _delete_=True)
    return {
        "train_cfg.max_epochs": epochs,
        "train_cfg.val_interval": epochs,
        "optim_wrapper.optimizer.lr": 0.02,
        "param_scheduler": cosine,
    }


def depth(share, end=3):
    return dict(type="rep_plugin.LinearizeHook", end=end, latency=share, runtime="onnxruntime", act_after="relu6")


def from_stock(*hooks, epochs=6, **row):
    return dict(config=stock, options={"custom_hooks": [*hooks], **tune(epochs)}, start=start, **row)


rep = "rep_mbv2_fashion_mnist"
merge = dict(type="rep_plugin.ReparamHook")
stock = "mobilenetv2_fashion_mnist"
start = "stock MobileNetV2 0.5, twelve epochs"
channels = {0.9: 0.8, 0.8: 0.6, 0.7: 0.45}  # share of the time: of the multiply-adds

rows = {
    start: dict(config=stock, options=cycle(12), hidden=True),
    "stock MobileNetV2 0.5": from_stock(),
    **{f"depth, latency {share}": from_stock(depth(share), merge) for share in (0.9, 0.8, 0.7)},
    **{
        f"channels, multiply-adds {share}": from_stock(dict(type="rep_plugin.PruneHook", begin=0, macs=share))
        for share in channels.values()
    },
    "all blocks linear, annealed": dict(
        config=rep,
        options={
            "model.backbone.anneal": True,
            "custom_hooks": [dict(type="rep_plugin.LinearizeHook", end=3), merge],
            **tune(6),
        },
        start=start,
    ),
    "channels, three epochs": from_stock(dict(type="rep_plugin.PruneHook", begin=0, macs=0.8), epochs=3, hidden=True),
    "channels, then depth": dict(
        deployed_of="channels, three epochs",
        options={"custom_hooks": [depth(0.9, end=2), merge], **tune(3)},
    ),
    "all blocks linear, from scratch": dict(config=rep, options=cycle(18)),
    **{
        f"stock MobileNetV2 {width}": dict(config=stock, options={"model.backbone.widen_factor": width, **cycle(18)})
        for width in (0.42, 0.35, 0.25)
    },
}
claims = [
    dict(
        says=f"at {share} of the time, fewer layers are better than fewer channels",
        source="the papers on depth compression, 2022 to 2024",
        better=f"depth, latency {share}",
        than=f"channels, multiply-adds {macs}",
        by=0.5,
    )
    for share, macs in channels.items()
] + [
    dict(
        says="the shortened network is as accurate as stock",
        source="the same",
        better="depth, latency 0.9",
        than="stock MobileNetV2 0.5",
        by=-0.2,
    )
]
