"""Mixed precision where there is no graphics card."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated

import torch
from mmengine.logging import print_log
from mmengine.optim import OptimWrapper
from mmengine.runner.amp import autocast
from torch.optim import Optimizer

from rep_plugin.arguments import Count, That, checked
from rep_plugin.registry import OPTIM_WRAPPERS

# Instructions that oneDNN multiplies bfloat16 numbers with, of x86 and of ARM.
INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "avx10_2", "avx_ne_convert", "bf16", "sve_bf16")


def slow_bfloat16() -> str | None:
    """Return why bfloat16 is slower than float32 on this CPU, in a line; None where it is not."""
    found = torch.cpu.get_capabilities()
    if any(found.get(name) for name in INSTRUCTIONS):
        return None
    own = "bf16" if "arm" in str(found.get("architecture")) else "avx512_bf16 or amx_bf16"
    return (
        f"mixed precision is up to ten times SLOWER than float32 on this CPU ({found.get('cpu_name', 'unknown')}), which has "
        f"no bfloat16 instructions ({own}): leave out --amp"
    )


CLIPS = {"max_norm", "norm_type", "error_if_nonfinite", "foreach", "clip_value", "type"}
Clip = Annotated[
    Mapping[str, object], That(lambda clip: clip and set(clip) <= CLIPS, "arguments of torch's clip_grad_norm_")
]


@checked
@OPTIM_WRAPPERS.register_module()
class CpuAmpOptimWrapper(OptimWrapper):
    """Mixed precision on the CPU: mmengine's AmpOptimWrapper refuses to be built there.

    bfloat16 has the range of float32, so that the loss needs no scaling. Arguments as OptimWrapper's. A CPU without
    instructions for it computes it slowly, and the log says so.

    Args:
        optimizer: steps the parameters.
        accumulative_counts: batches a step.
        clip_grad: arguments of torch's ``clip_grad_norm_``, or with ``type='value'`` of ``clip_grad_value_``.
    """

    def __init__(self, optimizer: Optimizer, accumulative_counts: Count = 1, clip_grad: Clip | None = None):
        super().__init__(optimizer, accumulative_counts, None if clip_grad is None else dict(clip_grad))
        if reason := slow_bfloat16():
            print_log(reason, logger="current", level=logging.WARNING)

    @contextmanager
    def optim_context(self, model: torch.nn.Module) -> Iterator[None]:
        with super().optim_context(model), autocast(device_type="cpu", dtype=torch.bfloat16):
            yield
