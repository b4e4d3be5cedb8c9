# Bilinear CNN on VGG16-BN, CUB-200-2011. First step: the head alone, on a backbone that is frozen, statistics included.
# It is a run of its own: a parameter that is frozen when a run starts may never enter its optimizer.
_base_ = ["./bcnn_vgg16bn_cub.py"]

model = dict(backbone=dict(frozen_stages=5))
# Features of unit norm need large weights: the head learns at 1e-2 x 100 = 1.
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={"head.fc": dict(lr_mult=100.0)}))
train_cfg = dict(max_epochs=30)
load_from = None
