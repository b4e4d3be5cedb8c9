# Bilinear Rep-MobileNetV2 on the rendered birds, sparse training. Then remove channels: ..._oneshot.py, ..._iterative.py or
# ..._soft.py, which merge the branches of what is left at their end.
_base_ = ["../bcnn/bcnn_rep_mbv2_mini_cub.py"]

custom_hooks = [dict(type="rep_plugin.SparsityHook", strength=1e-3)]
