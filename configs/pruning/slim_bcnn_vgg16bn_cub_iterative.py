# The sparse network of slim_bcnn_vgg16bn_cub.py, pruned in four rounds.
_base_ = ["../_base_/cub_224.py", "../_base_/slim_bcnn_vgg16bn_iterative.py"]

model = dict(head=dict(num_classes=200))
load_from = "work_dirs/slim_bcnn_vgg16bn_cub/epoch_60.pth"
