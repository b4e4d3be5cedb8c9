"""Blocks with the attributes and semantics of the official repositories, written anew and small.

Facts from DingXiaoH/RepVGG, /DiverseBranchBlock, /ACNet, /RepLKNet-pytorch, AILab-CVC/UniRepLKNet, apple/ml-mobileone and
ml-fastvit: names of the children, order of the layers, what is padded with what.
"""

import torch
import torch.nn.functional as F
from torch import nn


def conv_bn(c_in, c_out, k, stride=1, padding=0, groups=1, dilation=1):
    seq = nn.Sequential()
    seq.add_module("conv", nn.Conv2d(c_in, c_out, k, stride, padding, dilation, groups, bias=False))
    seq.add_module("bn", nn.BatchNorm2d(c_out))
    return seq


class SEBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, 2, 1), nn.Conv2d(2, channels, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))


class RepVGGBlock(nn.Module):
    def __init__(self, c_in, c_out, stride=1, groups=1, se=False, post_se=False, qa=False):
        super().__init__()
        self.deploy, self.in_channels, self.groups = False, c_in, groups
        self.nonlinearity = nn.ReLU()
        self.se = SEBlock(c_out) if se else nn.Identity()
        keeps = c_in == c_out and stride == 1
        self.rbr_dense = conv_bn(c_in, c_out, 3, stride, 1, groups)
        if qa:  # QARepVGG: a bare 1x1, a bare identity, and a BN after the sum
            self.rbr_identity = nn.Identity() if keeps else None
            self.rbr_1x1 = nn.Conv2d(c_in, c_out, 1, stride, groups=groups, bias=False)
            self.bn = nn.BatchNorm2d(c_out)
        else:
            self.rbr_identity = nn.BatchNorm2d(c_in) if keeps else None
            self.rbr_1x1 = conv_bn(c_in, c_out, 1, stride, 0, groups)
        if post_se:
            self.post_se = SEBlock(c_out)

    def forward(self, x):
        y = self.rbr_dense(x) + self.rbr_1x1(x)
        if self.rbr_identity is not None:
            y = y + self.rbr_identity(x)
        y = self.se(y)
        y = self.nonlinearity(self.bn(y) if hasattr(self, "bn") else y)
        return self.post_se(y) if hasattr(self, "post_se") else y

    def switch_to_deploy(self):
        raise AssertionError("ours is to merge it")


class MobileOneBlock(nn.Module):
    def __init__(self, c_in, c_out, k=3, stride=1, groups=1, branches=2, se=False):
        super().__init__()
        self.inference_mode = False
        self.se = SEBlock(c_out) if se else nn.Identity()
        self.activation = nn.ReLU()
        self.rbr_skip = nn.BatchNorm2d(c_in) if c_in == c_out and stride == 1 else None
        self.rbr_conv = nn.ModuleList([conv_bn(c_in, c_out, k, stride, k // 2, groups) for _ in range(branches)])
        self.rbr_scale = conv_bn(c_in, c_out, 1, stride, 0, groups) if k > 1 else None

    def forward(self, x):
        y = 0 if self.rbr_skip is None else self.rbr_skip(x)
        y = y if self.rbr_scale is None else y + self.rbr_scale(x)
        return self.activation(self.se(y + sum(branch(x) for branch in self.rbr_conv)))


class IdentityBasedConv1x1(nn.Conv2d):
    def __init__(self, channels, groups):
        super().__init__(channels, channels, 1, groups=groups, bias=False)
        width = channels // groups
        self.id_tensor = torch.eye(width).repeat(groups, 1).view(channels, width, 1, 1)
        nn.init.normal_(self.weight, std=0.3)

    def forward(self, x):
        return F.conv2d(x, self.weight + self.id_tensor.to(self.weight), None, groups=self.groups)


class BNAndPadLayer(nn.Module):
    def __init__(self, pad_pixels, channels):
        super().__init__()
        self.bn, self.pad_pixels = nn.BatchNorm2d(channels), pad_pixels

    def forward(self, x):
        x, p, bn = self.bn(x), self.pad_pixels, self.bn
        ring = (bn.bias - bn.running_mean * bn.weight / torch.sqrt(bn.running_var + bn.eps)).view(1, -1, 1, 1)
        out = ring.expand(x.shape[0], -1, x.shape[2] + 2 * p, x.shape[3] + 2 * p).clone()
        out[:, :, p : p + x.shape[2], p : p + x.shape[3]] = x
        return out


class DiverseBranchBlock(nn.Module):
    def __init__(self, c_in, c_out, k=3, stride=1, groups=1):
        super().__init__()
        p = k // 2
        self.nonlinear = nn.ReLU()
        self.dbb_origin = conv_bn(c_in, c_out, k, stride, p, groups)
        self.dbb_avg, self.dbb_1x1_kxk = nn.Sequential(), nn.Sequential()
        inner = c_in if groups < c_out else 2 * c_in
        if groups < c_out:
            self.dbb_avg.add_module("conv", nn.Conv2d(c_in, c_out, 1, groups=groups, bias=False))
            self.dbb_avg.add_module("bn", BNAndPadLayer(p, c_out))
            self.dbb_avg.add_module("avg", nn.AvgPool2d(k, stride, 0))
            self.dbb_1x1 = conv_bn(c_in, c_out, 1, stride, 0, groups)
            self.dbb_1x1_kxk.add_module("idconv1", IdentityBasedConv1x1(c_in, groups))
        else:
            self.dbb_avg.add_module("avg", nn.AvgPool2d(k, stride, p))
            self.dbb_1x1_kxk.add_module("conv1", nn.Conv2d(c_in, inner, 1, groups=groups, bias=False))
        self.dbb_avg.add_module("avgbn", nn.BatchNorm2d(c_out))
        self.dbb_1x1_kxk.add_module("bn1", BNAndPadLayer(p, inner))
        self.dbb_1x1_kxk.add_module("conv2", nn.Conv2d(inner, c_out, k, stride, 0, groups=groups, bias=False))
        self.dbb_1x1_kxk.add_module("bn2", nn.BatchNorm2d(c_out))

    def forward(self, x):
        y = self.dbb_origin(x) + self.dbb_avg(x) + self.dbb_1x1_kxk(x)
        return self.nonlinear(y + self.dbb_1x1(x) if hasattr(self, "dbb_1x1") else y)


class ACBlock(nn.Module):
    def __init__(self, c_in, c_out, k=3, stride=1, padding=1, groups=1, dilation=1):
        super().__init__()
        self.deploy = False
        more = max(0, padding - k // 2)
        self.crop = max(0, k // 2 - padding)
        options = {"stride": stride, "groups": groups, "bias": False, "dilation": dilation}
        self.square_conv = nn.Conv2d(c_in, c_out, k, padding=padding, **options)
        self.ver_conv = nn.Conv2d(c_in, c_out, (k, 1), padding=(padding, more), **options)
        self.hor_conv = nn.Conv2d(c_in, c_out, (1, k), padding=(more, padding), **options)
        self.square_bn, self.ver_bn, self.hor_bn = (nn.BatchNorm2d(c_out) for _ in range(3))

    def forward(self, x):
        c = self.crop
        tall, wide = (x[:, :, :, c:-c], x[:, :, c:-c]) if c else (x, x)
        y = self.square_bn(self.square_conv(x)) + self.ver_bn(self.ver_conv(tall))
        return y + self.hor_bn(self.hor_conv(wide))


class ReparamLargeKernelConv(nn.Module):
    def __init__(self, channels, k, small):
        super().__init__()
        self.lkb_origin = conv_bn(channels, channels, k, 1, k // 2, channels)
        self.small_conv = conv_bn(channels, channels, small, 1, small // 2, channels)

    def forward(self, x):
        return self.lkb_origin(x) + self.small_conv(x)


class DilatedReparamBlock(nn.Module):
    def __init__(self, channels, k=9):
        super().__init__()
        self.kernel_sizes, self.dilates = [5, 5, 3], [1, 2, 4]
        self.lk_origin = nn.Conv2d(channels, channels, k, padding=k // 2, groups=channels, bias=False)
        self.origin_bn = nn.BatchNorm2d(channels)
        for side, d in zip(self.kernel_sizes, self.dilates):
            conv = nn.Conv2d(channels, channels, side, 1, d * (side - 1) // 2, d, channels, bias=False)
            self.add_module(f"dil_conv_k{side}_{d}", conv)
            self.add_module(f"dil_bn_k{side}_{d}", nn.BatchNorm2d(channels))

    def forward(self, x):
        y = self.origin_bn(self.lk_origin(x))
        for side, d in zip(self.kernel_sizes, self.dilates):
            y = y + getattr(self, f"dil_bn_k{side}_{d}")(getattr(self, f"dil_conv_k{side}_{d}")(x))
        return y


class RepMixer(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = MobileOneBlock(channels, channels, 3, groups=channels, branches=0)
        self.norm.rbr_scale = None
        self.mixer = MobileOneBlock(channels, channels, 3, groups=channels, branches=1)
        self.norm.activation, self.mixer.activation = nn.Identity(), nn.Identity()
        self.layer_scale = nn.Parameter(torch.rand(channels, 1, 1) + 0.5)

    def forward(self, x):
        return x + self.layer_scale * (self.mixer(x) - self.norm(x))
