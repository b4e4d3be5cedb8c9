"""Mixed precision where there is no graphics card."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.optim import OptimWrapper
from mmengine.runner.amp import autocast

from rep_plugin.registry import OPTIM_WRAPPERS


@OPTIM_WRAPPERS.register_module()
class CpuAmpOptimWrapper(OptimWrapper):
    """Mixed precision on the CPU: mmengine's AmpOptimWrapper refuses to be built there.

    bfloat16 has the range of float32, so that the loss needs no scaling. Arguments as OptimWrapper's.
    """

    @contextmanager
    def optim_context(self, model: torch.nn.Module) -> Iterator[None]:
        with super().optim_context(model), autocast(device_type="cpu", dtype=torch.bfloat16):
            yield
