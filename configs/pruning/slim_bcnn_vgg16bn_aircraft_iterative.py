# The sparse network of slim_bcnn_vgg16bn_aircraft.py, pruned in four rounds.
_base_ = ["../_base_/aircraft_224.py", "../_base_/slim_bcnn_vgg16bn_iterative.py"]

model = dict(head=dict(num_classes=100))
load_from = "work_dirs/slim_bcnn_vgg16bn_aircraft/epoch_60.pth"
