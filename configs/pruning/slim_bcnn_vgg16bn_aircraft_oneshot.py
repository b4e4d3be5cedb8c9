# The sparse network of slim_bcnn_vgg16bn_aircraft.py, pruned once and fine-tuned. 20, 40, 60 and 80 %:
#   rep-plugin sweep slim_bcnn_vgg16bn_aircraft_oneshot --rates 0.2 0.4 0.6 0.8
_base_ = ["../_base_/aircraft_224.py", "../_base_/slim_bcnn_vgg16bn_oneshot.py"]

model = dict(head=dict(num_classes=100))
load_from = "work_dirs/slim_bcnn_vgg16bn_aircraft/epoch_60.pth"
