# The sparse network of slim_bcnn_vgg16bn_cars.py, pruned in four rounds.
_base_ = ["../_base_/cars_224.py", "../_base_/slim_bcnn_vgg16bn_iterative.py"]

model = dict(head=dict(num_classes=196))
optim_wrapper = dict(optimizer=dict(lr=1e-1))
load_from = "work_dirs/slim_bcnn_vgg16bn_cars/epoch_60.pth"
