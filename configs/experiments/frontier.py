# Depth compression against what else makes MobileNetV2 faster: channel pruning and narrower stock networks. All rows see the
# same images under one cycle; what is compressed is compressed on the way, after three epochs. Latencies are shares of the
# time of stock's in ONNX Runtime; multiply-adds and widths are chosen to come to about the same; `--time` measures what
# came out.
_base_ = ["./_base_fashion_mnist.py"]

title = "Accuracy against latency of MobileNetV2 0.5 on Fashion-MNIST: 12,000 images, 12 epochs in one cycle"
baseline = "stock MobileNetV2 0.5"
seeds = 1
options = {
    "optim_wrapper.optimizer.lr": 0.05,
    "train_cfg.max_epochs": 12,
    "train_cfg.val_interval": 12,
    "param_scheduler": dict(
        type="OneCycleLR", eta_max=0.05, pct_start=0.2, by_epoch=True, convert_to_iter_based=True, _delete_=True
    ),
}


def with_hooks(*hooks):
    return dict(config=stock, options={"custom_hooks": list(hooks)})


def depth(share):
    return dict(
        type="rep_plugin.LinearizeHook", begin=3, end=6, latency=share, runtime="onnxruntime", act_after="relu6"
    )


merge = dict(type="rep_plugin.ReparamHook")
stock = "mobilenetv2_fashion_mnist"
channels = {0.9: 0.9, 0.8: 0.8, 0.7: 0.55}  # share of the time: of the multiply-adds
widths = {0.9: 0.42, 0.8: 0.38, 0.7: 0.32}  # share of the time: of stock's width, which is 1

rows = {
    "stock MobileNetV2 0.5": with_hooks(),
    **{f"depth, latency {share}": with_hooks(depth(share), merge) for share in (0.9, 0.8, 0.7)},
    **{
        f"channels, multiply-adds {share}": with_hooks(dict(type="rep_plugin.PruneHook", begin=3, macs=share))
        for share in channels.values()
    },
    **{
        f"stock MobileNetV2 {width}": dict(config=stock, options={"model.backbone.widen_factor": width})
        for width in widths.values()
    },
    "all blocks linear, from scratch": dict(config="rep_mbv2_fashion_mnist"),
}
claims = [
    *(
        dict(
            says=f"at {share} of the time, fewer layers are better than {what}",
            source="the papers on depth compression, 2022 to 2024",
            better=f"depth, latency {share}",
            than=than,
            by=0.5,
        )
        for share in channels
        for what, than in (
            ("fewer channels", f"channels, multiply-adds {channels[share]}"),
            ("a narrower network", f"stock MobileNetV2 {widths[share]}"),
        )
    ),
    dict(
        says="the shortened network is as accurate as stock",
        source="the same",
        better="depth, latency 0.9",
        than="stock MobileNetV2 0.5",
        by=-0.2,
    ),
]
