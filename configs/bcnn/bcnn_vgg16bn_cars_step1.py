# Bilinear CNN on VGG16-BN, Stanford Cars. First step: the head alone, on a backbone that is frozen, statistics included.
# It is a run of its own: a parameter that is frozen when a run starts may never enter its optimizer.
_base_ = ["./bcnn_vgg16bn_cars.py"]

model = dict(backbone=dict(frozen_stages=5))
# Features of unit norm need large weights: the head learns at 1e-1 x 10 = 1.
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={"head.fc": dict(lr_mult=10.0)}))
train_cfg = dict(max_epochs=30)
load_from = None
