# What the sets on Fashion-MNIST share: 12,000 of 60,000 training images, validated and logged alike.
options = {"train_dataloader.dataset.indices": 12000, "default_hooks.logger.interval": 20}
