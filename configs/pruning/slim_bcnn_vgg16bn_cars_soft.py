# The sparse network of slim_bcnn_vgg16bn_cars.py, pruned softly. The study's 60 %:
#   rep-plugin sweep slim_bcnn_vgg16bn_cars_soft --rates 0.6 --cfg-options \
#     train_cfg.max_epochs=150 custom_hooks.1.interval=3
_base_ = ["../_base_/cars_224.py", "../_base_/slim_bcnn_vgg16bn_soft.py"]

model = dict(head=dict(num_classes=196))
load_from = "work_dirs/slim_bcnn_vgg16bn_cars/epoch_60.pth"
