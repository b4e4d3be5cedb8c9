# Rep-MobileNetV2 that starts as the stock MobileNetV2 in `load_from` and is annealed over the first epochs.
_base_ = ["../../configs/rep_mbv2_fashion_mnist.py"]

model = dict(backbone=dict(anneal=True))
custom_hooks = [dict(type="rep_plugin.LinearizeHook", end=3), dict(type="rep_plugin.ReparamHook")]
