# Centripetal SGD on the network and schedule of slim_resnet18_fashion_mnist.py: from the first step on, the filters of
# each cluster are drawn together; after the last epoch they are equal, and become one without any loss or fine-tuning.
_base_ = ["./slim_resnet18_fashion_mnist.py"]

custom_hooks = [dict(type="rep_plugin.CentripetalHook", macs=0.5, min_channels=8, round_to=4)]
