"""Attention loses whole heads; the numbers that its code makes views by follow, or the channels that they are taken from."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from rep_plugin import apply_plan, load, plan_pruning, save
from tests.helpers import relative_error

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
WIDTH, HEADS, DEEP = 24, 4, 6  # channels of a token; heads, and channels in a head


class Fused(nn.Module):
    """One layer for q, k and v; ``product`` is what follows."""

    def __init__(self, product):
        super().__init__()
        self.product, self.num_heads, self.head_dim = product, HEADS, DEEP
        self.attn_dim = HEADS * DEEP
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * self.attn_dim), nn.Linear(self.attn_dim, WIDTH)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        return self.proj(self.product(self, q, k, v).transpose(1, 2).reshape(b, n, self.attn_dim))


class Separate(nn.Module):
    """A layer each for q, k and v; sizes are those of the tokens, heads a part of them."""

    def __init__(self):
        super().__init__()
        self.heads = HEADS
        self.q, self.k, self.v, self.proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = (part(x).view(b, n, self.heads, c // self.heads).transpose(1, 2) for part in (self.q, self.k, self.v))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))


class Chunked(nn.Module):
    """Thirds of one layer, split into heads by einsum's letters."""

    def __init__(self):
        super().__init__()
        self.heads, self.qkv, self.proj = HEADS, nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in self.qkv(x).chunk(3, dim=-1))
        weights = torch.einsum("bihd,bjhd->bhij", q, k).mul(DEEP**-0.5).softmax(-1)
        return self.proj(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2))


class Across(nn.Module):
    """Attention of channels to channels, with a temperature for each head."""

    def __init__(self):
        super().__init__()
        self.heads, self.temperature = HEADS, nn.Parameter(torch.rand(HEADS, 1, 1) + 0.5)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 4, 1).unbind(0)
        weights = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)) * self.temperature
        return self.proj((weights.softmax(-1) @ v).permute(0, 3, 1, 2).reshape(b, n, c))


class Unequal(nn.Module):
    """Keys shorter than values, taken from each head; a bias for each head and distance, looked up in a table."""

    def __init__(self):
        super().__init__()
        self.heads, self.qkv, self.proj = HEADS, nn.Linear(WIDTH, HEADS * 16), nn.Linear(HEADS * 8, WIDTH)
        self.table = nn.Parameter(torch.randn(HEADS, 31))
        self.register_buffer("index", torch.arange(16)[:, None] - torch.arange(16) + 15)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, self.heads, -1).split([4, 4, 8], dim=3)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        weights = q @ k.transpose(-2, -1) * 0.5 + self.table[:, self.index]
        return self.proj((weights.softmax(-1) @ v).transpose(1, 2).reshape(b, n, -1))


def fused_product(net, q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def plain_product(net, q, k, v):
    return ((q * DEEP**-0.5) @ k.transpose(-2, -1)).softmax(-1) @ v


def masked_product(net, q, k, v):
    mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    return (q @ k.mT / 2).masked_fill(~mask, -100.0).softmax(-1) @ v


def rotated_product(net, q, k, v):
    angle = torch.outer(torch.arange(q.shape[-2]), torch.arange(DEEP)).to(q)
    turned = [t * angle.cos() + torch.stack([-t[..., 1::2], t[..., ::2]], -1).flatten(-2) * angle.sin() for t in (q, k)]
    return F.scaled_dot_product_attention(*turned, v)


class Normed(nn.Module):
    """Norms of each head, whose weights all heads share."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.gain = nn.LayerNorm(DEEP), nn.RMSNorm(DEEP), nn.Parameter(torch.rand(DEEP))

    def __call__(self, net, q, k, v):
        return F.scaled_dot_product_attention(self.q(q), self.k(k) * self.gain, v, scale=0.3)


class Pooled(nn.Module):
    """A convolution on each head, as MViT's, and a linear layer on each."""

    def __init__(self):
        super().__init__()
        self.pool, self.turn = nn.Conv2d(DEEP, DEEP, 3, 1, 1, groups=DEEP, bias=False), nn.Linear(DEEP, DEEP)

    def __call__(self, net, q, k, v):
        n, d = v.shape[2:]
        pooled = self.pool(v.reshape(-1, 4, 4, d).permute(0, 3, 1, 2)).reshape(-1, net.num_heads, d, n)
        return F.scaled_dot_product_attention(self.turn(q), k, pooled.transpose(2, 3)) + q


ATTENTION = {
    "fused": lambda: Fused(fused_product),
    "plain": lambda: Fused(plain_product),
    "masked": lambda: Fused(masked_product),
    "rotated": lambda: Fused(rotated_product),
    "normed": lambda: Fused(Normed()),
    "pooled": lambda: Fused(Pooled()),
    "separate": Separate,
    "chunked": Chunked,
    "across": Across,
    "unequal": Unequal,
}


class Net(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.stem, self.norm, self.attention = nn.Conv2d(3, WIDTH, 4, 4), nn.LayerNorm(WIDTH), attention
        self.up, self.down, self.head = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = x + self.attention(self.norm(x))
        return self.head((x + self.down(F.gelu(self.up(x)))).mean(1))


def made(name):
    torch.manual_seed(0)
    net = Net(ATTENTION[name]()).eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.4)
    return net


@pytest.mark.parametrize("name", ATTENTION)
def test_whole_heads_are_removed(name):
    net = made(name)
    plan = plan_pruning(net, X, "l1", 0.45, scope="layer")
    layer = "attention.v" if name == "separate" else "attention.qkv"
    before, after = plan.widths[layer]
    assert after < before and after % (before // HEADS) == 0 and layer not in plan.frozen
    assert apply_plan(net, plan).max_rel_error < 1e-9
    heads = getattr(net.attention, "num_heads", getattr(net.attention, "heads", None))
    assert heads == after * HEADS // before
    net.train()(X).sum().backward()
    assert all(p.grad is None or p.grad.shape == p.shape for p in net.parameters())


@pytest.mark.parametrize("name", ["fused", "plain", "masked", "rotated", "normed", "pooled", "unequal", "chunked"])
def test_what_is_left_is_the_network_without_these_heads(name):
    """The reference is ours alone: what the projection reads of a head that is gone is set to zero."""
    net = made(name).double()
    plan = plan_pruning(net, X, "l1", 0.5, ignore=["stem", "up"])
    per_head = plan.widths["attention.qkv"][0] // HEADS
    gone = set(range(plan.widths["attention.qkv"][0])) - set(plan.kept["attention.qkv"])
    together = name == "unequal"  # q, k and v of a head
    heads = {index // per_head if together else index % WIDTH // DEEP for index in gone}
    assert 0 < len(heads) < HEADS and len(gone) == len(heads) * per_head
    masked = copy.deepcopy(net)
    with torch.no_grad():
        columns = masked.attention.proj.weight.view(WIDTH, HEADS, -1)
        columns[:, sorted(heads)] = 0
    apply_plan(net, plan)
    assert relative_error(net(X.double()), masked(X.double())) < 1e-9
    assert net.attention.proj.in_features == columns.shape[-1] * (HEADS - len(heads))


def test_heads_that_share_their_keys_go_and_the_keys_stay():
    class Single(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads, self.q, self.kv = HEADS, nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * DEEP)
            self.proj = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            q = self.q(x).unflatten(2, (self.heads, DEEP)).transpose(1, 2)
            k, v = self.kv(x).chunk(2, dim=-1)
            weights = (q @ k.unsqueeze(1).mT).softmax(-1)
            return self.proj((weights @ v.unsqueeze(1)).transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    net = Net(Single()).eval()
    plan = plan_pruning(net, X, "l1", 0.45, scope="layer")
    assert plan.widths["attention.q"][1] in (DEEP, 2 * DEEP, 3 * DEEP), plan.frozen
    assert plan.widths["attention.kv"] == (2 * DEEP, 2 * DEEP)
    assert apply_plan(net, plan).max_rel_error < 1e-9


def test_channels_that_are_summed_over_go_from_both_maps():
    class Affinity(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 16, 4, 4), nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 5)

        def forward(self, x):
            return self.head((self.a(x).flatten(2).transpose(1, 2) @ self.b(x).flatten(2)).softmax(-1).amax(1))

    torch.manual_seed(0)
    net = Affinity().eval()
    plan = plan_pruning(net, X, "l1", 0.4)
    assert plan.kept["a"] == plan.kept["b"] and ("a", "b") in plan.groups
    assert apply_plan(net, plan).max_rel_error < 1e-9


TIMM = {
    "vit": ("vit_tiny_patch16_224", dict(img_size=32, depth=2)),
    "test_vit, norms of heads": ("test_vit", dict(img_size=32, depth=2, qk_norm=True)),
    "swin": ("swin_tiny_patch4_window7_224", dict(img_size=32, window_size=4, depths=(2, 1), num_heads=(3, 6))),
    "swin v2": ("swinv2_tiny_window8_256", dict(img_size=32, window_size=4, depths=(1, 1), num_heads=(3, 6))),
    "xcit": ("xcit_nano_12_p16_224", dict(depth=1, cls_attn_layers=1)),
    "beit": ("beit_base_patch16_224", dict(img_size=32, depth=1, embed_dim=96, num_heads=4)),
    "cait, talking heads": ("cait_xxs24_224", dict(img_size=32, depth=1)),
}


@pytest.mark.parametrize(("name", "fused"), [*((name, 2) for name in TIMM), ("vit", 0), ("swin", 0), ("beit", 0)])
def test_networks_of_timm_lose_heads_and_load_again(name, fused, tmp_path, monkeypatch):
    monkeypatch.setattr(timm.layers.config, "_USE_FUSED_ATTN", fused)  # 2: those that timm calls experimental as well
    torch.manual_seed(0)
    arch, given = TIMM[name]
    net = timm.create_model(arch, num_classes=3, **given).eval()
    for key, parameter in net.named_parameters():
        nn.init.normal_(parameter, 1.0 if parameter.dim() < 2 and "weight" in key else 0.0, 0.2)
    x = torch.randn(2, 3, 32, 32)
    plan = plan_pruning(net, x, "l1", macs=0.6, scope="layer")
    narrower = [key for key, (before, after) in plan.widths.items() if "attn.qkv" in key and after < before]
    assert narrower and apply_plan(net, plan, example_input=x).max_rel_error < 1e-9
    save(net, tmp_path)
    assert torch.equal(load(tmp_path).eval()(x), net(x))
