# What `make demo` trains, and stock MobileNetV2 of the same width under its schedule.
title = "The demo: rendered birds, 20 classes, 16 epochs, width 0.5"
baseline = "stock MobileNetV2"
seeds = 1

demo = "rep_mbv2_mini_cub"
averaged = dict(type="EMAHook", ema_type="MomentumAnnealingEMA", momentum=0.01, gamma=25, update_buffers=True)
stock = {
    "model.backbone": dict(_delete_=True, type="MobileNetV2", widen_factor=0.5),
    "custom_hooks": [averaged],
}
rows = {"Rep-MobileNetV2": dict(config=demo), "stock MobileNetV2": dict(config=demo, options=stock)}
claims = [
    dict(
        says="the merged network is at least as accurate as stock MobileNetV2",
        source="the thesis on Rep-MobileNetV2, 2023",
        better="Rep-MobileNetV2",
        than="stock MobileNetV2",
    ),
]
