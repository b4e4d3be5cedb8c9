# A bilinear CNN on rendered birds: what pooling, batch norm and L1 do before pruning, and the ways to prune. The heavier
# penalty is that of the last batch norm before the bilinear pooling.
title = "A small bilinear CNN pruned on rendered birds: 20 classes, 10 sparse epochs and 4 or 5 of fine-tuning"
baseline = "bilinear, L1 1e-3, ten epochs"
seeds = 1
options = {"default_hooks.logger.interval": 20}

dense, sparse = "bcnn_rep_mbv2_mini_cub", "slim_bcnn_rep_mbv2_mini_cub"
one_shot, iterative, soft = (f"{sparse}_{way}" for way in ("oneshot", "iterative", "soft"))
average = {
    "model.neck": dict(type="GlobalAveragePooling"),
    "model.head": dict(
        _delete_=True,
        type="LinearClsHead",
        num_classes=20,
        in_channels=160,
        loss=dict(type="CrossEntropyLoss", loss_weight=1.0),
        topk=(1,),
    ),
}
last = "backbone.stages.6.*"
heavier = {
    "custom_hooks": [dict(type="rep_plugin.SparsityHook", strength=1e-3, overrides={last: 1e-2})],
}
start = "bilinear, L1 1e-3, ten epochs"
rows = {
    "average pooling, ten epochs": dict(config=dense, options=average),
    "bilinear, ten epochs": dict(config=dense),
    start: dict(config=sparse),
    "bilinear, heavier L1 on the last BN, ten epochs": dict(config=sparse, options=heavier),
    "40 % in one shot": dict(config=one_shot, start=start),
    "40 % in three rounds": dict(config=iterative, start=start),
    "40 % softly": dict(config=soft, start=start),
    "40 % in one shot, heavier L1 on the last BN": dict(
        config=one_shot, start="bilinear, heavier L1 on the last BN, ten epochs"
    ),
    "80 % in one shot": dict(config=one_shot, options={"custom_hooks.0.prune_fraction": 0.8}, start=start),
    "80 % in one shot, heavier L1 on the last BN": dict(
        config=one_shot,
        options={"custom_hooks.0.prune_fraction": 0.8},
        start="bilinear, heavier L1 on the last BN, ten epochs",
    ),
}
claims = [
    dict(
        says="bilinear pooling is better than average pooling",
        source="the thesis on bilinear CNNs, 2020",
        better="bilinear, ten epochs",
        than="average pooling, ten epochs",
    ),
    dict(
        says="rounds are better than one shot",
        source="the same",
        better="40 % in three rounds",
        than="40 % in one shot",
    ),
    dict(
        says="a heavier penalty on the last batch norm lets more go",
        source="the same",
        better="80 % in one shot, heavier L1 on the last BN",
        than="80 % in one shot",
    ),
]
