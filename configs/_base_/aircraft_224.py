_base_ = ["./fgvc_224.py"]

data_root = "data/fgvc-aircraft-2013b"
missing_data_hint = {
    data_root: (
        "put FGVC Aircraft there, or for a trial rendered birds in its layout: "
        "rep-plugin script make_mini_fgvc.py --layout aircraft --out data/fgvc-aircraft-2013b"
    )
}

data_preprocessor = dict(num_classes=100)
train_dataloader = dict(dataset=dict(type="FGVCAircraft", data_root=data_root, split="trainval"))
val_dataloader = dict(dataset=dict(type="FGVCAircraft", data_root=data_root, split="test"))
test_dataloader = val_dataloader
