# Quantisation-aware fine-tuning of a merged Rep-MobileNetV2 on Fashion-MNIST: three epochs from what `rep-plugin train
# rep_mbv2_fashion_mnist` has written, at a hundredth of its learning rate. Ends with int8.onnx and its report.
_base_ = ["../rep_mbv2_fashion_mnist.py"]

model = dict(backbone=dict(deploy=True))
load_from = "work_dirs/rep_mbv2_fashion_mnist/deploy.pth"

optim_wrapper = dict(optimizer=dict(lr=0.001))
train_cfg = dict(max_epochs=3)

custom_hooks = [dict(type="rep_plugin.QATHook", freeze=2)]
