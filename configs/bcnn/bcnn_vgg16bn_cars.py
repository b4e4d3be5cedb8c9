# Bilinear CNN on VGG16-BN, Stanford Cars. Second step, everything trains: run bcnn_vgg16bn_cars_step1.py before.
_base_ = ["../_base_/cars_224.py", "../_base_/bcnn_vgg16bn.py"]

model = dict(head=dict(num_classes=196))
optim_wrapper = dict(optimizer=dict(lr=1e-1))
load_from = "work_dirs/bcnn_vgg16bn_cars_step1/epoch_30.pth"
