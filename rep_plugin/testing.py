"""For tests, users' own too: models whose batch norms hide no mistake."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rep_plugin.measure.forward import run_model


def calibrate_random_bn_(model: nn.Module, x: Tensor, seed: int = 0) -> nn.Module:
    """Give every BN random gammas (a quarter negative), betas, and statistics that fit an input.

    For tests of merges, folds and pruning: a fresh BN is the identity and hides a wrong fold, and uncalibrated statistics
    squash deep signals and hide it too.

    Args:
        model: the model, changed in place.
        x: images (N, C, H, W).
        seed: seed of the random values.

    Returns:
        The model, in eval mode.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        >>> bool((calibrate_random_bn_(model, torch.randn(8, 3, 5, 5))[1].weight != 1).all())
        True
    """
    generator = torch.Generator().manual_seed(seed)
    bns = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        for bn in bns:
            if bn.weight is not None:
                size = bn.weight.shape
                gamma = torch.rand(size, generator=generator) + 0.5
                sign = torch.where(torch.rand(size, generator=generator) < 0.25, -1.0, 1.0)
                bn.weight.copy_(gamma * sign)
                bn.bias.copy_(torch.randn(size, generator=generator) * 0.5)
        momenta = {bn: bn.momentum for bn in bns}
        for bn in bns:
            bn.momentum = None
            bn.reset_running_stats()
        model.train()
        run_model(model, x)
        run_model(model, F.hardtanh(x.flip(0)))
        for bn, momentum in momenta.items():
            bn.momentum = momentum
    model.eval()
    return model
