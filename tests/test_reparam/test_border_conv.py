"""The layer that a merged sequence becomes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rep_plugin.functional.kernels import ConvParams
from rep_plugin.functional.padded import PaddedConv
from rep_plugin.reparam.border_conv import BorderConv2d, build_conv


def merged(ring: bool, padding=(1, 1)) -> PaddedConv:
    params = ConvParams(torch.randn(6, 2, 3, 3).double(), torch.randn(6).double(), 2, (2, 2))
    return PaddedConv(params, padding, torch.randn(6, 1, 3, 3).double() if ring else None)


def test_adds_the_answer_to_a_map_of_ones():
    layer = BorderConv2d(4, 6, 3, 2, 1, groups=2)
    nn.init.normal_(layer.ring)
    for size in ((1, 1), (5, 8)):
        x = torch.randn(3, 4, *size)
        ones = F.conv2d(torch.ones(1, 1, *size), layer.ring, None, 2, 1)
        plain = F.conv2d(x, layer.weight, layer.bias, 2, 1, groups=2)
        assert torch.allclose(layer(x), plain + ones, atol=1e-6)


@pytest.mark.parametrize("ring", [False, True])
def test_is_built_like_its_sources(ring):
    source = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last).eval()
    conv, state = merged(ring), torch.random.get_rng_state()
    layer = build_conv(conv, [source])
    assert torch.equal(state, torch.random.get_rng_state())
    assert type(layer) is (BorderConv2d if ring else nn.Conv2d) and not layer.training
    assert layer.weight.dtype == torch.float32 and layer.weight.is_contiguous(memory_format=torch.channels_last)
    assert (layer.in_channels, layer.out_channels, layer.groups, layer.stride) == (4, 6, 2, (2, 2))
    assert all(p.requires_grad and p.is_leaf for p in layer.parameters())
    source.requires_grad_(False)
    assert not any(p.requires_grad for p in build_conv(merged(ring), [source]).parameters())


def test_negative_padding_is_refused():
    with pytest.raises(ValueError, match=r"padding must be >= 0, got \(-1, 0\)"):
        build_conv(merged(False, (-1, 0)), [nn.Conv2d(4, 6, 3)])
