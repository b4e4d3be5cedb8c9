"""Blocks of the field, written afresh, and of nobody: merged by what their forward computes, without an adapter."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rep_plugin
from rep_plugin.errors import ArgumentError, NothingToMergeError
from rep_plugin.measure.differences import compare_outputs
from rep_plugin.measure.forward import run_model
from rep_plugin.reparam.adapters import find_adapter
from rep_plugin.reparam.border_conv import BorderConv2d
from rep_plugin.reparam.linear_parts import KIND
from tests import official_layouts as official
from tests.attack.blocks import NOT_LINEAR, attack

C = 8


def conv_bn(side: int, out: int = C, groups: int = 1, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(C, out, side, stride, side // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out))


class RTDetrBlock(nn.Module):
    """RT-DETR: two branches, named after nothing that is known."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.act = conv_bn(3), conv_bn(1), nn.SiLU()

    def forward(self, x):
        return self.act(self.conv1(x) + self.conv2(x))


class RepConvN(nn.Module):
    """YOLOv9: an identity that may be absent."""

    def __init__(self, identity: bool = True):
        super().__init__()
        self.conv1, self.conv2, self.act = conv_bn(3), conv_bn(1), nn.SiLU()
        self.bn = nn.BatchNorm2d(C) if identity else None

    def forward(self, x):
        id_out = 0 if self.bn is None else self.bn(x)
        return self.act(self.conv1(x) + self.conv2(x) + id_out)


class QARepVGGBlock(nn.Module):
    """YOLO-NAS: a weighted branch without BN, a BN after the sum."""

    def __init__(self):
        super().__init__()
        self.branch_a, self.branch_b = conv_bn(3), nn.Conv2d(C, C, 1)
        self.alpha = nn.Parameter(torch.tensor([0.7]))
        self.post_bn, self.nonlinearity, self.se = nn.BatchNorm2d(C), nn.ReLU(), nn.Identity()

    def forward(self, x):
        return self.se(self.nonlinearity(self.post_bn(self.branch_a(x) + self.alpha * self.branch_b(x) + x)))


class DepthwiseSum(nn.Module):
    """RepViT's and YOLOv10's depthwise sum: all of it is linear."""

    def __init__(self):
        super().__init__()
        self.wide, self.narrow = conv_bn(7, groups=C), conv_bn(3, groups=C)

    def forward(self, x):
        return self.wide(x) + self.narrow(x) + x


class FastBlock(nn.Module):
    """FAST: a horizontal and a vertical kernel beside the square one."""

    def __init__(self):
        super().__init__()
        self.main = conv_bn(3)
        self.ver = nn.Sequential(nn.Conv2d(C, C, (3, 1), padding=(1, 0), bias=False), nn.BatchNorm2d(C))
        self.hor = nn.Sequential(nn.Conv2d(C, C, (1, 3), padding=(0, 1), bias=False), nn.BatchNorm2d(C))

    def forward(self, x):
        y = self.main(x)
        for branch in (self.ver, self.hor):
            y += branch(x)
        return F.relu(y)


class CollapsibleBlock(nn.Module):
    """SESR: wide, narrow again, no BN, a residual."""

    def __init__(self):
        super().__init__()
        self.expand, self.squeeze = nn.Conv2d(C, 64, 3, padding=1, bias=False), nn.Conv2d(64, C, 1)
        self.act = nn.PReLU(C)

    def forward(self, x):
        return self.act(self.squeeze(self.expand(x)) + x)


class EdgeBlock(nn.Module):
    """ECBSR: a fixed edge filter behind a 1x1 layer, its scales learned."""

    def __init__(self):
        super().__init__()
        self.conv, self.point = nn.Conv2d(C, C, 3, padding=1), nn.Conv2d(C, C, 1, bias=False)
        self.scale = nn.Parameter(torch.rand(C, 1, 1, 1))
        self.register_buffer(
            "mask", torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]]).expand(C, 1, 3, 3)
        )

    def forward(self, x):
        edges = F.conv2d(F.pad(self.point(x), (1, 1, 1, 1)), self.scale * self.mask, groups=C)
        return F.leaky_relu(self.conv(x) + edges, 0.1)


class ComputedKernel(nn.Module):
    """OREPA: one convolution whose kernel is computed from several in every call."""

    def __init__(self):
        super().__init__()
        self.square, self.point = nn.Parameter(torch.randn(C, C, 3, 3)), nn.Parameter(torch.randn(C, C, 1, 1))
        self.average, self.vector = nn.Parameter(torch.randn(C, C)), nn.Parameter(torch.randn(2, C))
        self.register_buffer("prior", torch.full((3, 3), 1 / 9))
        self.bn = nn.BatchNorm2d(C)

    def kernel(self):
        average = torch.einsum("oi,hw->oihw", self.average, self.prior)
        square = torch.einsum("oihw,o->oihw", self.square, self.vector[0])
        return square + F.pad(self.point, (1, 1, 1, 1)) * self.vector[1].view(-1, 1, 1, 1) + average

    def forward(self, x):
        return F.relu(self.bn(F.conv2d(x, self.kernel(), padding=1)))


class Squeeze(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Conv2d(C, C, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.fc(x.mean((2, 3), keepdim=True)))


class GatedSum(nn.Module):
    """What follows is not one layer after the other."""

    def __init__(self):
        super().__init__()
        self.branches, self.se = nn.ModuleList([conv_bn(side) for side in (1, 3, 5)]), Squeeze()

    def forward(self, x):
        y = F.gelu(sum(branch(x) for branch in self.branches))
        return self.se(y) + y.mean((2, 3), keepdim=True)


class Parallel(nn.Module):
    """Parallel layers side by side, and a difference of halves."""

    def __init__(self):
        super().__init__()
        self.one, self.two = conv_bn(3, 4), conv_bn(3, 12)

    def forward(self, x):
        a, b = torch.cat([self.one(x), self.two(x)], 1).chunk(2, 1)
        return ((a - b) / 2 + a[:, :8]).tanh()


BLOCKS = [
    RTDetrBlock, RepConvN, QARepVGGBlock, DepthwiseSum, FastBlock, CollapsibleBlock, EdgeBlock, ComputedKernel, GatedSum,
    Parallel,
]  # fmt: skip


def net_of(block: nn.Module) -> nn.Module:
    return randomised(
        nn.Sequential(nn.Conv2d(3, C, 3, 2, 1), nn.ReLU(), block, nn.AdaptiveAvgPool2d(3), nn.Conv2d(C, 4, 1))
    )


def randomised(net: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        if tensor.is_floating_point() and "mask" not in name and "prior" not in name:
            tensor.data.uniform_(0.5, 1.5) if "running_var" in name else tensor.data.normal_(0, 0.5)
    return net.double().eval()


X = torch.randn(2, 3, 17, 22, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.__name__)
def test_blocks_of_the_field_merge_without_an_adapter(kind):
    net = net_of(kind())
    assert find_adapter(net[2]) is None
    merged, report = rep_plugin.reparameterize(net, X, fold_bn=False)
    assert [block.kind for block in report.blocks] == [f"{kind.__name__}, {KIND}"] and not report.notes
    for shape in ((1, 3, 17, 22), (3, 3, 30, 9), (2, 3, 64, 65)):
        x = torch.randn(shape, dtype=torch.float64)
        assert compare_outputs(net(x), merged(x)).max_rel < 1e-12
    assert len([m for m in merged[2].modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)]) == 1
    assert report.macs_after <= report.macs_before
    for parameter in merged.parameters():  # what was merged is what runs
        parameter.data.zero_()
    assert merged(X).unique().numel() == 1


@pytest.mark.parametrize("kind", [RTDetrBlock, GatedSum], ids=["layers in a row", "graph"])
def test_merged_blocks_are_saved_built_again_trained_and_scripted(kind, tmp_path):
    net = net_of(kind()).float()
    merged, _ = rep_plugin.reparameterize(net, X.float())
    rep_plugin.save(merged, tmp_path / "model")
    again = rep_plugin.load(tmp_path / "model", net_of(kind()).float())
    assert torch.equal(again(X.float()), merged(X.float()))
    torch.jit.script(merged)
    merged.train()(X.float()).sum().backward()
    assert all(p.grad is not None for p in merged.parameters())


def test_attributes_that_parents_read_are_carried_over():
    block = RTDetrBlock()
    block.f, block.i, block.stride_of_neck = -1, 3, [8, 16]
    merged, _ = rep_plugin.reparameterize(net_of(block), X)
    assert (merged[2].f, merged[2].i, merged[2].stride_of_neck) == (-1, 3, [8, 16])


class Uneven(nn.Module):
    """A dense 1x1 beside a depthwise 7x7: one convolution would take 49 times as much."""

    def __init__(self):
        super().__init__()
        self.wide, self.point = conv_bn(7, groups=C), conv_bn(1)

    def forward(self, x):
        return self.wide(x) + self.point(x)


class Bottleneck(nn.Module):
    """A bias before a zero padding: exact only with a bias that depends on the position."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(C, 32, 1), nn.Conv2d(32, C, 3, padding=1))

    def forward(self, x):
        return x + self.body(x)


class OffCentre(nn.Module):
    """Two windows that do not lie on each other."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(C, C, 3), nn.Conv2d(C, C, 1)

    def forward(self, x):
        return self.a(x) + self.b(x)[..., :-2, :-2]


@pytest.mark.parametrize(
    ("kind", "words"),
    [(Uneven, "would take 3,136 multiply-adds"), (Bottleneck, "merge_linear=True merges it"), (OffCentre, "")],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_sums_that_one_convolution_would_not_serve_are_left_and_named(kind, words):
    with pytest.raises(NothingToMergeError) as error:
        rep_plugin.reparameterize(net_of(kind()), X, fold_bn=False)
    assert any("block '2'" in note and words in note for note in error.value.notes) or not words


def test_a_bias_before_the_padding_is_kept_at_the_border():
    net = net_of(Bottleneck())
    merged, report = rep_plugin.reparameterize(net, X, merge_linear=True)
    assert isinstance(merged[2], BorderConv2d) and report.max_rel_error < 1e-12


class Whole(nn.Module):
    """A model whose own forward adds branches and goes on in a way of its own."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, C, 3, padding=1), nn.Conv2d(3, C, 1), nn.Conv2d(C, 4, 1)

    def forward(self, x):
        y = torch.relu(self.a(x) + self.b(x))
        return self.head(y) + self.head(y * 0.5)


def test_the_class_of_a_whole_model_stays():
    with pytest.raises(NothingToMergeError, match="Whole") as error:
        rep_plugin.reparameterize(Whole().double().eval(), X)
    assert any("put it into a module of its own" in note for note in error.value.notes)


class Forward(nn.Module):
    """Branches ``p`` and ``q``, a layer ``r`` and a factor, used as a function says."""

    def __init__(self, forward, width: int = C):
        super().__init__()
        self.p, self.q, self.r = conv_bn(3, width, 1), conv_bn(1, width), conv_bn(3)
        if width != C:
            self.p, self.q = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 1)
        self.gain = nn.Parameter(torch.rand(C, 1, 1) + 0.5)
        self.function = forward

    def forward(self, x):
        return self.function(self, x)


def two_sums(net, x):
    y = F.relu(net.r(x) + x * net.gain)
    return F.silu(net.p(y) + net.q(y)) + x


def twice(net, x):
    y = F.relu(net.p(x) + net.q(x))
    return F.relu(net.p(y) + net.q(y))


def half(net, x):
    a, b = x.chunk(2, 1)
    return torch.cat([a, F.relu(net.p(b) + net.q(b))], 1)


def in_a_dict(net, x):
    given = {"map": x.relu(), "factor": 2}
    return {"map": net.p(given["map"]) + net.q(given["map"])}["map"] * given["factor"]


def behind_a_bias(net, x):
    y = net.r(x)  # with its bias, the padding of p and q would not be zeros of x
    return F.relu(net.p(y) + net.q(y))


def read_twice(net, x):
    y = net.r(x)
    return F.relu(net.p(y) + net.q(y)) + y


INNER = {  # how many convolutions are left; r counts where it is called
    "behind an activation": (lambda net, x: (lambda y: F.relu(net.p(y) + net.q(y)))(F.relu(net.r(x))), 2),
    "under a shortcut": (lambda net, x: x + F.relu(net.p(x) + net.q(x)), 1),
    "two sums": (two_sums, 2),
    "layers called twice": (twice, 2),
    "of half the channels": (half, 1),
    "in a dict": (in_a_dict, 1),
    "behind a padding on one side": (lambda net, x: (lambda y: net.p(y) + net.q(y))(F.pad(x, (0, 1, 0, 1))), 1),
    "behind a bias": (behind_a_bias, 2),
    "of a map that is read elsewhere": (read_twice, 2),
}


@pytest.mark.parametrize("name", INNER)
def test_sums_inside_of_a_forward_are_merged(name):
    forward, convs = INNER[name]
    net = net_of(Forward(forward, C // 2 if forward is half else C))
    merged, report = rep_plugin.reparameterize(net, X)
    assert [block.kind for block in report.blocks if block.name == "2"] == [f"Forward, {KIND}"] and not report.notes
    assert report.max_rel_error < 1e-12
    assert sum(isinstance(layer, nn.Conv2d) for layer in merged[2].modules()) == convs


def test_what_is_left_of_a_merged_block_is_named():
    def forward(net, x):
        y = F.relu(net.p(x) + net.q(x))
        return net.wide(y) + net.tall(y)

    block = Forward(forward)
    block.wide, block.tall = nn.Conv2d(C, C, (1, 5), padding=(0, 2)), nn.Conv2d(C, C, (5, 1), padding=(2, 0))
    _, report = rep_plugin.reparameterize(net_of(block), X)
    assert [block.name for block in report.blocks if block.kind.endswith(KIND)] == ["2"]
    (note,) = report.notes
    assert note.startswith("block '2' is merged in part: one convolution would take 1,600 multiply-adds")


class Outer(nn.Module):
    """A block in a block, whose own forward adds nothing."""

    def __init__(self):
        super().__init__()
        self.first, self.inner = conv_bn(1), RTDetrBlock()

    def forward(self, x):
        return self.inner(self.first(x))


def test_what_is_skipped_is_not_merged_by_what_holds_it():
    merged, report = rep_plugin.reparameterize(net_of(Outer()), X, skip="2.inner")
    assert type(merged[2]) is Outer and type(merged[2].inner) is RTDetrBlock
    assert [block.name for block in report.blocks if block.name.startswith("2")] == ["2.first.0"]


class Caller(nn.Module):
    """A parent that calls another method of its block."""

    def __init__(self, directly: bool):
        super().__init__()
        self.blocks, self.directly = nn.ModuleList([Doubling()]), directly

    def forward(self, x):
        if self.directly:
            return self.blocks[0].double_up(self.blocks[0](x))
        for block in self.blocks:
            x = block.double_up(block(x))
        return x


class Doubling(RTDetrBlock):
    def double_up(self, x):
        return 2 * x


@pytest.mark.parametrize("directly", [True, False])
def test_a_block_of_which_another_method_is_called_stays(directly):
    merged, report = rep_plugin.reparameterize(net_of(Caller(directly)), X)
    assert type(merged[2].blocks[0]) is Doubling
    assert any("'2.blocks.0' is read by the forward of '2' (test_linear_parts.py:" in note for note in report.notes)


@pytest.mark.parametrize("whole", [True, False])
def test_traced_models_are_looked_at_too(whole):
    net = net_of(Forward(INNER["under a shortcut"][0]))
    if whole:
        net = torch.fx.symbolic_trace(net)
    else:
        net[2] = torch.fx.symbolic_trace(net[2])
    _, report = rep_plugin.reparameterize(net, X)
    assert [b.kind for b in report.blocks if b.name == ("" if whole else "2")] == [f"GraphModule, {KIND}"]


CROPS = {
    "a crop of the input": lambda net, x: net.b(x)[:, :, 1:-1, 1:-1] + net.a(x[:, :, 1:-1, 1:-1]),
    "a crop in one direction": lambda net, x: net.a(x[:, :, 1:-1]) + net.b(x)[:, :, 1:-1],
    "crops of both": lambda net, x: net.a(x[:, :, 1:-1])[:, :, :, 1:-1] + net.b(x)[..., 1:-1, 1:-1],
    "a crop of a padded map": lambda net, x: (
        net.a(F.pad(x, (3, 3, 3, 3))[..., 2:-2, 2:-2]) + net.b(F.pad(x, (1, 1, 1, 1)))
    ),
}


@pytest.mark.parametrize("name", CROPS)
def test_crops_are_negative_paddings(name):
    class Cropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(C, C, 3, bias=False), nn.Conv2d(C, C, 5, padding=1)

        def forward(self, x):
            return CROPS[name](self, x)

    net = net_of(Cropping())
    try:
        merged, report = rep_plugin.reparameterize(net, X, fold_bn=False)
    except NothingToMergeError as error:
        raise AssertionError(error.notes) from error
    assert compare_outputs(net(X), merged(X)).max_rel < 1e-12 and len(report.blocks) == 1


class CroppedAndPadded(nn.Module):
    """Zeros stand where the map had values: no crop."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(C, C, 3, padding=1), nn.Conv2d(C, C, 1)

    def forward(self, x):
        return self.a(x[:, :, 1:-1, 1:-1]) + self.b(x[:, :, 1:-1, 1:-1])


def test_a_cropped_and_padded_map_is_no_convolution():
    with pytest.raises(NothingToMergeError):
        rep_plugin.reparameterize(net_of(CroppedAndPadded()), X)


USES = {
    "index of a stack": lambda a, b: torch.stack([a, b])[1],
    "slice of a stack": lambda a, b: torch.stack([a, b])[:, :1].sum(0),
    "stack as it is": lambda a, b: torch.stack([a, b]).contiguous().sum(0),
    "stack and a constant": lambda a, b: torch.stack([a, torch.ones_like(a)]).sum(0) + b,
    "dropout of a stack": lambda a, b: F.dropout(torch.stack([a, b]), 0.5, False).sum(0),
    "stacks added": lambda a, b: (torch.stack([a, b]) + a).sum(0),
    "chunks joined": lambda a, b: torch.cat(a.chunk(2, 1), 1) + b,
    "two sides padded": lambda a, b: F.pad(a, (1, 0), value=0.3)[..., 1:] + b,
    "channels padded": lambda a, b: F.pad(a, (0, 0, 0, 0, 1, 0))[:, 1:] + b,
    "mask added": lambda a, b: a + torch.ones(C, 1, 1, dtype=torch.bool) + b,
}


@pytest.mark.parametrize("name", USES)
def test_other_uses_of_what_is_read_are_no_error(name):
    class Uses(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = conv_bn(3), conv_bn(1)

        def forward(self, x):
            return USES[name](self.a(x), self.b(x))

    net = net_of(Uses())
    merged, _ = rep_plugin.reparameterize(net, X)
    assert compare_outputs(net(X), merged(X)).max_rel < 1e-12


@pytest.mark.parametrize("seed", range(2 * len(NOT_LINEAR)))
def test_random_affine_blocks_merge_and_look_alikes_do_not(seed, tmp_path):
    assert attack(seed, tmp_path)["look-alikes right"] == 1


class Listed(nn.Module):
    """A neck that calls its blocks from a plain list, as detectors do, and reads an attribute of one."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block
        block.f = 2.0
        self._order = [("first", block)]
        self.names = {"last": self._order[0]}

    def forward(self, x):
        return self._order[0][1](x) * self._order[0][1].f + self.names["last"][1](x)


@pytest.mark.parametrize("kind", [RTDetrBlock, official.RepVGGBlock], ids=["read", "adapter"])
def test_what_is_held_in_lists_is_what_was_merged(kind):
    net = net_of(Listed(kind() if kind is RTDetrBlock else kind(C, C)))
    merged, report = rep_plugin.reparameterize(net, X)
    assert compare_outputs(net(X), merged(X)).max_rel < 1e-12 and report.blocks[0].name == "2.block"
    merged[2].block[0].weight.data.zero_()
    assert merged[2]._order[0][1] is merged[2].block is merged[2].names["last"][1]
    assert isinstance(net[2]._order[0][1], kind)  # the given model is as it was


def test_sequences_without_a_bn_are_merged():
    net = nn.Sequential(nn.Conv2d(3, 32, 1, bias=False), nn.Conv2d(32, 3, 3, padding=1), nn.ReLU()).double().eval()
    merged, report = rep_plugin.reparameterize(net, X, merge_linear=True)
    assert len(report.blocks) == 1 and isinstance(merged[1], nn.Identity)


@pytest.mark.parametrize("wrap", [torch.jit.script, lambda net: torch.jit.trace(net, X)], ids=["scripted", "traced"])
def test_scripted_models_are_refused_in_a_line(wrap):
    with pytest.raises(ArgumentError, match="^got a scripted or traced Sequential: pass the model"):
        rep_plugin.reparameterize(wrap(net_of(RTDetrBlock())), X)


class Several(nn.Module):
    """An image, class numbers that choose a shift of the map, and a weight by name."""

    def __init__(self):
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, C, 3, 2, 1), RTDetrBlock()
        self.shift, self.head = nn.Embedding(5, C), nn.Conv2d(C, 4, 1)

    def forward(self, image, classes, weight=None):
        y = self.block(self.stem(image).relu()) + self.shift(classes)[:, :, None, None]
        return (
            {"map": self.head(y), "classes": classes} if weight is None else self.head(y) * weight[:, None, None, None]
        )


EXAMPLES = {
    "tuple": (X, torch.tensor([1, 4])),
    "dict": {"image": X, "classes": torch.tensor([1, 4]), "weight": torch.rand(2, dtype=torch.float64)},
}


@pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)
def test_models_of_several_inputs_go_through_every_verb(example):
    net = randomised(Several())

    def run(model):
        return compare_outputs(run_model(net, example), run_model(model, example)).max_rel

    merged, report = rep_plugin.reparameterize(net, example)
    assert run(merged) < 1e-12 and [block.name for block in report.blocks] == ["block"]
    expanded, _ = rep_plugin.expand(net, "acb", example_input=example)
    assert run(expanded) < 1e-12 and len(expanded.state_dict()) > len(net.state_dict())
    plan = rep_plugin.plan_pruning(net, example, scores="l1", prune_fraction=0.3)
    report = rep_plugin.apply_plan(net, plan, example_input=example)
    assert report.params_after < report.params_before and run_model(net, example) is not None
    with pytest.raises(ArgumentError, match="holds no float tensor"):
        rep_plugin.reparameterize(merged, (torch.tensor([1]),))


class Around(nn.Module):
    """Adds to what a block computes; of the block one convolution is left, which stands in front of the sum."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block, self.wide, self.tall = block, conv_bn(3), conv_bn(1)

    def forward(self, x):
        y = self.block(x)
        return (self.wide(y) + self.tall(y)).sigmoid() + y.mean()


@pytest.mark.parametrize("block", [official.RepVGGBlock, None], ids=["known", "of nobody"])
def test_an_inner_block_of_which_one_layer_is_left_is_merged_again(block, tmp_path):
    def build():
        torch.manual_seed(0)
        inner = Forward(lambda net, x: net.p(x) + net.q(x)) if block is None else block(C, C)
        if block is not None:
            inner.nonlinearity = nn.Identity()
        return net_of(Around(inner))

    net = build()
    merged, report = rep_plugin.reparameterize(net, X)
    inside = ["2.block"] if block is None else []  # itself one convolution, which has its name
    assert [b.name for b in report.blocks if b.name.startswith("2")] == [*inside, "2"] and report.max_rel_error < 1e-12
    assert sum(isinstance(layer, nn.Conv2d) for layer in merged[2].modules()) == 2
    rep_plugin.save(merged, tmp_path)
    assert torch.equal(rep_plugin.load(tmp_path, build()).eval()(X), merged(X))


class Blur(nn.Module):
    """A fixed filter, a buffer, between two layers, and a layer that does nothing behind it."""

    def __init__(self, learned: bool):
        super().__init__()
        kernel = torch.rand(C, 1, 3, 3)
        self.first, self.idle, self.last = nn.Conv2d(C, C, 1), nn.Identity(), nn.Conv2d(C, C, 1)
        if learned:
            self.kernel = nn.Parameter(kernel)
        else:
            self.register_buffer("kernel", kernel)

    def forward(self, x):
        y = F.pad(self.first(x).relu(), (1, 1, 1, 1))
        return self.last(self.idle(F.conv2d(y, self.kernel * 2 if self.training else self.kernel, groups=C)).relu())


@pytest.mark.parametrize("learned", [False, True])
def test_a_fixed_filter_is_nothing_to_merge(learned):
    if not learned:
        with pytest.raises(NothingToMergeError):
            rep_plugin.reparameterize(net_of(Blur(learned)), X, fold_bn=False)
        return
    merged, report = rep_plugin.reparameterize(net_of(Blur(learned)), X, fold_bn=False)
    assert [block.name for block in report.blocks] == ["2"] and report.max_rel_error < 1e-12
    assert merged[2].reparam_conv.groups == C
