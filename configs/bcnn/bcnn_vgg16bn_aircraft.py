# Bilinear CNN on VGG16-BN, FGVC Aircraft. Second step, everything trains: run bcnn_vgg16bn_aircraft_step1.py before.
_base_ = ["../_base_/bcnn_vgg16bn.py"]

data_root = "data/fgvc-aircraft-2013b"
missing_data_hint = "put FGVC Aircraft there, or render birds in its layout: tools/make_mini_fgvc.py --layout aircraft"

model = dict(head=dict(num_classes=100))
data_preprocessor = dict(num_classes=100)
train_dataloader = dict(
    dataset=dict(
        type="FGVCAircraft",
        data_root=data_root,
        split="trainval",
        pipeline={{_base_.train_pipeline}},
    ),
)
val_dataloader = dict(
    dataset=dict(
        type="FGVCAircraft",
        data_root=data_root,
        split="test",
        pipeline={{_base_.test_pipeline}},
    ),
)
test_dataloader = val_dataloader

load_from = "work_dirs/bcnn_vgg16bn_aircraft_step1/epoch_30.pth"
