import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rep_plugin.bilinear.pooling import BilinearPooling
from rep_plugin.blocks.families import RepVGGBlock
from rep_plugin.pruning.planning.options import SCORES, PruneOptions
from rep_plugin.pruning.planning.scores import score_units
from rep_plugin.pruning.tracing.tracer import trace_channels
from tests.test_pruning.nets import ConvBN, Halves, Pooled, Residual, ready

SHAPE = (2, 3, 13, 13)


def scores_of(net, kind, loader=None, loss=None, **options):
    trace = trace_channels(net, SHAPE)
    found = score_units(net, trace, PruneOptions(kind, **options), loader, loss)
    return {name: found[trace.channels.roots()[layer.labels]] for name, layer in trace.layers.items()}


def batches(number=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(SHAPE, generator=generator), torch.tensor([0, 1])) for _ in range(number)]


class Products(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.pool, self.fc = BilinearPooling(width), nn.Linear(width**2, 5)

    def forward(self, x):
        return self.fc(self.pool((x,))[0])


def test_bn_gamma_joins_tied_layers():
    net = ready(ConvBN(3, 8), Residual(8, 4), Pooled(8))
    first, last = net[0].bn.weight.detach().double().abs(), net[1].second.bn.weight.detach().double().abs()
    for reduction, expected in (
        ("mean", (first + last) / 2),
        ("sum", first + last),
        ("max", torch.maximum(first, last)),
    ):
        found = scores_of(net, "bn_gamma", reduction=reduction)
        torch.testing.assert_close(found["0.conv"], expected)
    assert found["2.fc"].isnan().all()


def test_kernel_norms():
    net = ready(ConvBN(3, 8), ConvBN(8, 5), Pooled(5))
    kernel = net[1].conv.weight.detach().double().flatten(1)
    distances = torch.stack([sum((kernel[i] - other).norm() for other in kernel) for i in range(5)])
    for kind, value in (("l1", kernel.abs().sum(1)), ("l2", kernel.norm(dim=1)), ("fpgm", distances)):
        torch.testing.assert_close(scores_of(net, kind)["1.conv"], value / value.mean())


def test_taylor_is_the_change_of_the_loss():
    """To first order: scaling a filter by (1 - h) changes the loss by h times its score."""
    net = ready(ConvBN(3, 8, act=nn.Softplus()), Pooled(8)).double()
    loader = [(x.double(), y) for x, y in batches(1)]
    found = scores_of(net, "taylor", loader=loader, loss=F.cross_entropy)["0.conv"]
    step = 1e-6
    for channel in range(8):
        with torch.no_grad():
            before = F.cross_entropy(net(loader[0][0]), loader[0][1])
            net[0].conv.weight[channel] *= 1 - step
            after = F.cross_entropy(net(loader[0][0]), loader[0][1])
            net[0].conv.weight[channel] /= 1 - step
        assert abs((before - after).abs().item() / step - found[channel].item()) < 1e-5


def test_taylor_leaves_no_gradient():
    net = ready(ConvBN(3, 8), Pooled(8)).train()
    scores_of(net, "taylor", loader=batches(), loss=F.cross_entropy)
    assert all(p.grad is None for p in net.parameters()) and net.training and net[0].bn.training


def test_a_block_is_scored_by_its_merged_kernel_and_its_output_bns():
    net = ready(RepVGGBlock(3, 8, stride=2), RepVGGBlock(8, 8, act=nn.ReLU()), Pooled(8)).train()
    kernel = net.eval()[0].merged_kernel()[0].detach().double().flatten(1).abs().sum(1)
    other = net[1].merged_kernel()[0].detach().double().flatten(1).abs().sum(1)
    net.train()
    torch.testing.assert_close(scores_of(net, "l1")["0"], (kernel / kernel.mean() + other / other.mean()) / 2)
    gammas = [bn.weight.detach().double().abs() for block in net[:2] for bn in block.output_bns()]
    torch.testing.assert_close(scores_of(net, "bn_gamma")["0"], torch.stack(gammas).mean(0))
    found = scores_of(net, "taylor", loader=batches(), loss=F.cross_entropy)["0"]
    assert torch.isfinite(found).all() and found.min() >= 0
    net.eval()
    net[0].switch_to_deploy()
    torch.testing.assert_close(scores_of(net, "l2")["0"], scores_of(net, "l2")["1"])


class Flow(nn.Module):
    """A layer, its batch norm, and a layer that reads it: with a batch norm of its own, or without."""

    def __init__(self, depthwise=False, normed=True):
        super().__init__()
        self.first, self.second = ConvBN(3, 8), ConvBN(8, 6)
        self.middle = ConvBN(8, 8, groups=8) if depthwise else nn.Identity()
        if not normed:
            self.second = nn.Sequential(nn.Conv2d(8, 6, 1), nn.ReLU())
        self.pool = Pooled(6)

    def forward(self, x):
        return self.pool(self.second(self.middle(self.first(x))))


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("normed", [False, True])
def test_flow_is_variance_times_what_the_next_layer_takes_of_it(depthwise, normed):
    net = ready(Flow(depthwise, normed))
    flow = net[0]
    bn = (flow.middle if depthwise else flow.first).bn
    kernel = (flow.second.conv if normed else flow.second[0]).weight.detach().double()
    if normed:
        own = flow.second.bn
        kernel = kernel * (own.weight / (own.running_var + own.eps).sqrt()).detach().double().view(-1, 1, 1, 1)
    expected = bn.weight.detach().double() ** 2 * (kernel**2).sum((0, 2, 3))
    torch.testing.assert_close(scores_of(net, "flow")["0.first.conv"], expected)


def test_flow_does_not_ask_for_the_scale_of_weights():
    """What a batch norm evens out changes no score: half a filter in front of one, or a channel that the next takes twice."""
    net = ready(ConvBN(3, 8, act=nn.Identity()), ConvBN(8, 6), Pooled(6)).double()
    before = scores_of(net, "flow")["0.conv"]
    with torch.no_grad():
        net[0].conv.weight[0] *= 0.5
        net[0].bn.weight[1] *= 0.5
        net[0].bn.bias[1] *= 0.5
        net[1].conv.weight[:, 1] *= 2
    torch.testing.assert_close(scores_of(net, "flow")["0.conv"], before)


def test_flow_of_blocks_and_of_bilinear_heads():
    net = ready(
        RepVGGBlock(3, 8, stride=2), RepVGGBlock(8, 8, act=nn.ReLU()), ConvBN(8, 12), Halves(12), Pooled(12)
    ).eval()
    found = scores_of(net, "flow")
    assert all(found[name].gt(0).all() for name in ("0", "1", "2.conv"))
    head = nn.Sequential(ConvBN(3, 8), Products(8)).eval()
    with torch.no_grad():
        head[1].fc.weight.view(5, 8, 8)[:, 2] = 0
        head[1].fc.weight.view(5, 8, 8)[:, :, 2] = 0
    assert scores_of(head, "flow")["0.conv"].argmin() == 2


def test_random_is_seeded():
    net = ready(ConvBN(3, 8), Pooled(8))
    state = torch.get_rng_state()
    first, again, other = (scores_of(net, "random", seed=s)["0.conv"] for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("gamma", {}, "scores must be one of bn_gamma, .*got 'gamma', did you mean 'bn_gamma'"),
        ("l1", {"reduction": "min"}, "reduction must be one of max, mean, sum, got 'min'"),
        ("taylor", {}, "needs loader"),
        ("taylor", {"loader": [], "loss": F.cross_entropy}, "without any batch"),
        ({"nowhere": [1.0]}, {}, "'nowhere' that the model does not have"),
        ({"0.conv": [1.0]}, {}, "hold 1 numbers, the layer has 8 channels"),
        ({"0.conv": [float("nan")] * 8}, {}, r"scores\['0.conv'\]\[0\] must be a number, got nan"),
    ],
)
def test_errors(kind, options, message):
    with pytest.raises(ValueError, match=message):
        scores_of(ready(ConvBN(3, 8), Pooled(8)), kind, **options)


def test_bn_gamma_without_bn_says_what_to_use():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), Pooled(8))
    with pytest.raises(ValueError, match="has no BN for scores='bn_gamma': use scores='l1'"):
        scores_of(net, "bn_gamma")
    assert set(SCORES) == {"bn_gamma", "flow", "l1", "l2", "fpgm", "taylor", "random"}
