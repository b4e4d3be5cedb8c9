_base_ = ["./fgvc_224.py"]

data_root = "data/CUB_200_2011"
missing_data_hint = {
    data_root: (
        "put CUB-200-2011 there, or for a trial rendered birds in its layout: "
        "rep-plugin script make_mini_fgvc.py --layout cub --out data/CUB_200_2011"
    )
}

data_preprocessor = dict(num_classes=200)
train_dataloader = dict(dataset=dict(type="CUB", data_root=data_root, split="train"))
val_dataloader = dict(dataset=dict(type="CUB", data_root=data_root, split="test", test_mode=True))
test_dataloader = val_dataloader
