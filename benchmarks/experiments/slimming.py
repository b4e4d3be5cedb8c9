# Ways to slim one ResNet-18 by half of its multiply-adds, and what they must beat: the same widths from scratch, and
# Torch-Pruning (needs benchmarks/ on PYTHONPATH, see the Makefile). All rows have the same images, epochs and cosine.
title = "ResNet-18 of 16 to 128 channels slimmed on Fashion-MNIST: half of the multiply-adds, 12,000 images, 10 epochs in all"
baseline = "dense"
options = {"train_cfg.val_interval": 10, "default_hooks.logger.interval": 20}

network = "slim_resnet18_fashion_mnist"
sparse = dict(type="rep_plugin.SparsityHook", strength=1e-3, overrides={"backbone.layer4.1.bn2": 3e-3}, warmup=1, end=6)
prune = dict(type="rep_plugin.PruneHook", scores="bn_gamma", macs=0.5, begin=6, min_channels=4, round_to=4)

budget = dict(type="rep_plugin.PruneHook", macs=0.5, begin=6, min_channels=4, round_to=4)


def torch_pruning(**hook):
    return dict(
        config=network,
        options={
            "custom_imports": dict(imports=["torch_pruning_hook"], allow_failed_imports=False),
            "custom_hooks": [dict(type="TorchPruningHook", macs=0.5, begin=6, **hook)],
        },
    )


rows = {
    "dense": dict(config=network, options={"custom_hooks": []}),
    "a budget and nothing else": dict(config="flow_resnet18_fashion_mnist"),
    "a budget, multiples of 4": dict(config="flow_resnet18_fashion_mnist", options={"custom_hooks": [budget]}),
    "a budget, taught by the dense network": dict(
        config="flow_resnet18_fashion_mnist",
        options={"custom_hooks": [budget, dict(type="rep_plugin.DistillHook")]},
        seeds=1,
    ),
    "one shot": dict(config=network),
    "one shot, taught by the dense network": dict(
        config=network, options={"custom_hooks": [sparse, prune, dict(type="rep_plugin.DistillHook")]}
    ),
    "iterative": dict(config="slim_resnet18_fashion_mnist_iterative"),
    "soft": dict(config="slim_resnet18_fashion_mnist_soft"),
    "ResRep": dict(config="resrep_resnet18_fashion_mnist"),
    "Centripetal SGD": dict(config="csgd_resnet18_fashion_mnist"),
    "Torch-Pruning, BN scale": torch_pruning(kind="bn_scale", reg=1e-3),
    "Torch-Pruning, group norm": torch_pruning(kind="group_norm", reg=5e-4),
    "Torch-Pruning, group norm, multiples of 8": torch_pruning(kind="group_norm", reg=5e-4, round_to=8),
    "widths of one shot, from scratch": dict(
        widths_of="one shot", options={"optim_wrapper.optimizer.lr": 0.1, "train_cfg.max_epochs": 10}
    ),
}
claims = [
    dict(
        says="our default is at least as good as Torch-Pruning's group norm",
        source="our aim",
        better="a budget and nothing else",
        than="Torch-Pruning, group norm, multiples of 8",
    ),
    dict(
        says="so it is with multiples of 4",
        source="our aim",
        better="a budget, multiples of 4",
        than="Torch-Pruning, group norm",
    ),
    dict(
        says="a pruned network is better than its widths trained from scratch",
        source="the papers on pruning",
        better="one shot",
        than="widths of one shot, from scratch",
    ),
]
