# The networks of the survey on lightweight networks side by side, as stock code builds them, on images of 64 pixels and
# three channels (SqueezeNet needs benchmarks/ on PYTHONPATH, see the Makefile).
title = "Light networks on Fashion-MNIST, enlarged to 64 pixels: 12,000 images, 6 epochs, one cycle"
baseline = "MobileNetV2 0.5"
seeds = 1

color = [
    dict(type="NumpyToPIL"),
    dict(type="torchvision/Grayscale", num_output_channels=3),
    dict(type="PILToNumpy"),
    dict(type="Resize", scale=64),
]
pack = dict(type="PackInputs")
augment = [dict(type="RandomCrop", crop_size=64, padding=4), dict(type="RandomFlip", prob=0.5, direction="horizontal")]
options = {
    "train_dataloader.dataset.indices": 12000,
    "train_dataloader.dataset.pipeline": [*color, *augment, pack],
    "val_dataloader.dataset.pipeline": [*color, pack],
    "test_dataloader.dataset.pipeline": [*color, pack],
    "data_preprocessor.mean": [72.94] * 3,
    "data_preprocessor.std": [90.02] * 3,
    "default_hooks.logger.interval": 20,
    "train_cfg.max_epochs": 6,
    "train_cfg.val_interval": 6,
    "param_scheduler": dict(
        type="OneCycleLR", eta_max=0.1, pct_start=0.2, by_epoch=True, convert_to_iter_based=True, _delete_=True
    ),
    "custom_hooks": [],
}


def network(channels, rate=0.1, **backbone):
    return dict(
        config="rep_mbv2_fashion_mnist",
        options={
            "model.backbone": dict(_delete_=True, **backbone),
            "model.head.in_channels": channels,
            "param_scheduler.eta_max": rate,
        },
    )


def from_timm(channels, name):
    return network(channels, type="TIMMBackbone", model_name=name)


rows = {
    "SqueezeNet 1.1 (no batch norms, a tenth of the rate)": network(512, rate=0.01, type="SqueezeNet"),
    "MobileNetV1 1.0": from_timm(1024, "mobilenetv1_100"),
    "MobileNetV2 0.5": network(1280, type="MobileNetV2", widen_factor=0.5),
    "MobileNetV3-small": network(576, type="MobileNetV3", arch="small"),
    "ShuffleNetV1": network(960, type="ShuffleNetV1"),
    "ShuffleNetV2 0.5": network(1024, type="ShuffleNetV2", widen_factor=0.5),
    "GhostNet 0.5": from_timm(1280, "ghostnet_050"),
    "Rep-MobileNetV2 0.5": network(1280, type="rep_plugin.RepMobileNetV2", widen_factor=0.5),
}
rows["Rep-MobileNetV2 0.5"]["options"]["custom_hooks"] = [dict(type="rep_plugin.ReparamHook")]
rows["SqueezeNet 1.1 (no batch norms, a tenth of the rate)"]["options"]["custom_imports"] = dict(
    imports=["squeezenet"], allow_failed_imports=False
)
claims = [
    dict(
        says="Rep-MobileNetV2 is more accurate than MobileNetV2 of its width",
        source="the thesis on Rep-MobileNetV2, 2023",
        better="Rep-MobileNetV2 0.5",
        than="MobileNetV2 0.5",
    ),
]
