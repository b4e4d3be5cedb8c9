# The sparse network of slim_bcnn_vgg16bn_cub.py, pruned once and fine-tuned. 20, 40, 60 and 80 %:
#   rep-plugin sweep slim_bcnn_vgg16bn_cub_oneshot --rates 0.2 0.4 0.6 0.8
_base_ = ["../_base_/cub_224.py", "../_base_/slim_bcnn_vgg16bn_oneshot.py"]

model = dict(head=dict(num_classes=200))
load_from = "work_dirs/slim_bcnn_vgg16bn_cub/epoch_60.pth"
