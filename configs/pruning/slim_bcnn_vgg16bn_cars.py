# Bilinear CNN on VGG16-BN, Stanford Cars, sparse training: everything trains, with L1 on the gammas, after
# bcnn_vgg16bn_cars_step1.py. Then remove channels: ..._oneshot.py, ..._iterative.py or ..._soft.py.
_base_ = ["../bcnn/bcnn_vgg16bn_cars.py"]

# The last batch norm feeds the bilinear pooling: each of its channels costs 1,023 columns of the classifier.
custom_hooks = [
    dict(type="rep_plugin.SparsityHook", strength=1e-4, overrides={"backbone.features.16.bn": 5e-4}),
]
