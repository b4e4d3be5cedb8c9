# Bilinear CNN on VGG16-BN, CUB-200-2011. Second step, everything trains: run bcnn_vgg16bn_cub_step1.py before.
_base_ = ["../_base_/cub_224.py", "../_base_/bcnn_vgg16bn.py"]

model = dict(head=dict(num_classes=200))
load_from = "work_dirs/bcnn_vgg16bn_cub_step1/epoch_30.pth"
