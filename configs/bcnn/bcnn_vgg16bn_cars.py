# Bilinear CNN on VGG16-BN, Stanford Cars. Second step, everything trains: run bcnn_vgg16bn_cars_step1.py before.
_base_ = ["../_base_/bcnn_vgg16bn.py"]

data_root = "data/Stanford_Cars"
missing_data_hint = "put Stanford Cars there, or render birds in its layout: tools/make_mini_fgvc.py --layout cars"

model = dict(head=dict(num_classes=196))
data_preprocessor = dict(num_classes=196)
train_dataloader = dict(
    dataset=dict(
        type="StanfordCars",
        data_root=data_root,
        split="train",
        pipeline={{_base_.train_pipeline}},
    ),
)
val_dataloader = dict(
    dataset=dict(
        type="StanfordCars",
        data_root=data_root,
        split="test",
        pipeline={{_base_.test_pipeline}},
    ),
)
test_dataloader = val_dataloader
optim_wrapper = dict(optimizer=dict(lr=1e-1))

load_from = "work_dirs/bcnn_vgg16bn_cars_step1/epoch_30.pth"
