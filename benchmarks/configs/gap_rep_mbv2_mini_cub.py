# Global average pooling of the last convolution in place of bilinear pooling; all else as in the bilinear config.
_base_ = ["../../configs/bcnn/bcnn_rep_mbv2_mini_cub.py"]

model = dict(
    backbone=dict(out_indices=(7,)),  # average pooling profits from the 1280 channels of the last convolution
    neck=dict(type="GlobalAveragePooling"),
    head=dict(
        _delete_=True,
        type="LinearClsHead",
        num_classes=20,
        in_channels=1280,
        loss=dict(type="CrossEntropyLoss", loss_weight=1.0),
        topk=(1,),
    ),
)
optim_wrapper = dict(
    paramwise_cfg=dict(_delete_=True, norm_decay_mult=0.0, custom_keys={"fc": dict(lr_mult=1.0)}),
)
