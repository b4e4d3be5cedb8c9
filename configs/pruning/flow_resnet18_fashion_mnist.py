# What pruning does when it is told nothing but a budget: the network and schedule of slim_resnet18_fashion_mnist.py, without
# sparse training. After six epochs of ordinary training the channels go that add least to the layers behind them
# (scores="flow", the default), statistics of batch norms are measured anew, and the narrow network is fine-tuned.
# At the end: pruned.pth and pruned.py, which stock code loads, and pruned.rounds.json.
_base_ = ["../_base_/resnet18_fashion_mnist.py"]

custom_hooks = [dict(type="rep_plugin.PruneHook", macs=0.5, begin=6)]
