# Depth compression against what else makes MobileNetV2 faster, for as many epochs: narrower stock networks, all blocks
# linear, and channel pruning. Layers and channels go in the middle of one training, under one cycle of the learning rate.
# Latencies are shares of the time of stock's in ONNX Runtime, multiply-adds are chosen to come to about the same; `--time`
# measures what came out.
_base_ = ["./_base_fashion_mnist.py"]

title = "Accuracy against latency of MobileNetV2 0.5 on Fashion-MNIST: 12,000 images, 12 epochs in all"
baseline = "stock MobileNetV2 0.5"
seeds = 1
options = {"optim_wrapper.optimizer.lr": 0.05}

one_cycle = dict(
    type="OneCycleLR", eta_max=0.05, pct_start=0.2, by_epoch=True, convert_to_iter_based=True, _delete_=True
)
half = {"train_cfg.max_epochs": 6, "train_cfg.val_interval": 6, "param_scheduler": one_cycle}
whole = {"train_cfg.max_epochs": 12, "train_cfg.val_interval": 12, "param_scheduler": one_cycle}
rep = "rep_mbv2_fashion_mnist"
merge = dict(type="rep_plugin.ReparamHook")
stock = "mobilenetv2_fashion_mnist"
channels = {0.9: 0.8, 0.8: 0.6, 0.7: 0.45}  # share of the time: of the multiply-adds


def depth(share, begin=4, end=8):
    return dict(
        type="rep_plugin.LinearizeHook", begin=begin, end=end, latency=share, runtime="onnxruntime", act_after="relu6"
    )


rows = {
    **{
        f"stock MobileNetV2 {width}": dict(config=stock, options={"model.backbone.widen_factor": width, **whole})
        for width in (0.5, 0.42, 0.35, 0.25)
    },
    "all blocks linear, from scratch": dict(config=rep, options=whole),
    "all blocks linear, annealed": dict(
        config=rep,
        options={
            "model.backbone.anneal": True,
            "custom_hooks": [dict(type="rep_plugin.LinearizeHook", begin=4, end=8), merge],
            **whole,
        },
    ),
    **{
        f"depth, latency {share}": dict(config=stock, options={"custom_hooks": [depth(share), merge], **whole})
        for share in (0.9, 0.8, 0.7)
    },
    **{
        f"channels, multiply-adds {share}": dict(
            config=stock, options={"custom_hooks": [dict(type="rep_plugin.PruneHook", begin=4, macs=share)], **whole}
        )
        for share in channels.values()
    },
    "channels, six epochs": dict(
        config=stock,
        options={"custom_hooks": [dict(type="rep_plugin.PruneHook", begin=2, macs=0.8)], **half},
        hidden=True,
    ),
    "channels, then depth": dict(
        deployed_of="channels, six epochs",
        options={"custom_hooks": [depth(0.9, begin=0, end=3), merge], **half},
    ),
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
