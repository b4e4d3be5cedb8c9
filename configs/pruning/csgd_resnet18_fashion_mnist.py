# Centripetal SGD on the network, the images and the schedule of slim_resnet18_fashion_mnist.py. From the first step on
# the filters of each cluster are drawn together. After the last step they are equal, and become one without loss or
# fine-tuning. The paper's strength is 3e-3 for long trainings: distances fall as exp(-strength * sum(lr) / (1 -
# momentum)), here, in 940 steps, only by e^1.4; 0.03 brings them to what float32 can tell apart.
_base_ = ["./slim_resnet18_fashion_mnist.py"]

custom_hooks = [dict(type="rep_plugin.CentripetalHook", macs=0.5, strength=0.03, min_channels=4, round_to=4)]
