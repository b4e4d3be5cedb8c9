_base_ = ["./fgvc_224.py"]

data_root = "data/Stanford_Cars"
missing_data_hint = {
    data_root: (
        "put Stanford Cars there, or for a trial rendered birds in its layout: "
        "rep-plugin script make_mini_fgvc.py --layout cars --out data/Stanford_Cars"
    )
}

data_preprocessor = dict(num_classes=196)
train_dataloader = dict(dataset=dict(type="StanfordCars", data_root=data_root, split="train"))
val_dataloader = dict(dataset=dict(type="StanfordCars", data_root=data_root, split="test"))
test_dataloader = val_dataloader
