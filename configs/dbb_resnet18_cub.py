# ResNet-18 with Diverse Branch Blocks on CUB-200-2011: mmpretrain's own ResNet, one key changed. Merged after training,
# it is the stock ResNet-18 again: deploy.py has conv_cfg=dict(type="Conv2d").
_base_ = ["./rep_mbv2_cub.py"]

model = dict(
    backbone=dict(
        _delete_=True, type="ResNet", depth=18, conv_cfg=dict(type="rep_plugin.DBBConv2d")
    ),  # or ACBConv2d, RepConv2d
    head=dict(in_channels=512),
)
