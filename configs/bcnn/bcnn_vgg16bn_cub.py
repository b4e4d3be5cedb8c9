# Bilinear CNN on VGG16-BN, CUB-200-2011. Second step, everything trains: run bcnn_vgg16bn_cub_step1.py before.
_base_ = ["../_base_/bcnn_vgg16bn.py"]

data_root = "data/CUB_200_2011"
missing_data_hint = "put CUB-200-2011 there, or render birds in its layout: tools/make_mini_fgvc.py --layout cub"

model = dict(head=dict(num_classes=200))
data_preprocessor = dict(num_classes=200)
train_dataloader = dict(
    dataset=dict(
        type="CUB",
        data_root=data_root,
        split="train",
        pipeline={{_base_.train_pipeline}},
    ),
)
val_dataloader = dict(
    dataset=dict(
        type="CUB",
        data_root=data_root,
        split="test",
        test_mode=True,
        pipeline={{_base_.test_pipeline}},
    ),
)
test_dataloader = val_dataloader

load_from = "work_dirs/bcnn_vgg16bn_cub_step1/epoch_30.pth"
