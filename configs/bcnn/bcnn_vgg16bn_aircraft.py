# Bilinear CNN on VGG16-BN, FGVC Aircraft. Second step, everything trains: run bcnn_vgg16bn_aircraft_step1.py before.
_base_ = ["../_base_/aircraft_224.py", "../_base_/bcnn_vgg16bn.py"]

model = dict(head=dict(num_classes=100))
load_from = "work_dirs/bcnn_vgg16bn_aircraft_step1/epoch_30.pth"
