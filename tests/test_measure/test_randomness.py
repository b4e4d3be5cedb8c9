"""Verbs draw from generators of their own: ``torch.manual_seed`` counts, the state of the process stays."""

import random
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rep_plugin
from rep_plugin.measure.randomness import private_random
from rep_plugin.testing import calibrate_random_bn_

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
DRAWS = {
    "randn": lambda: torch.randn(3),
    "rand_like": lambda: torch.rand_like(torch.zeros(3)),
    "randint": lambda: torch.randint(0, 1000, (3,)),
    "randperm": lambda: torch.randperm(20),
    "normal": lambda: torch.normal(0.0, 1.0, (3,)),
    "bernoulli": lambda: torch.bernoulli(torch.full((30,), 0.5)),
    "dropout": lambda: F.dropout(torch.ones(30), 0.5, True),
    "uniform": lambda: torch.empty(3).uniform_(),
    "module": lambda: nn.Linear(3, 3).weight.detach(),
    "multinomial": lambda: torch.multinomial(torch.ones(30), 5),
    "rrelu": lambda: F.rrelu(-torch.ones(30), training=True),
}


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Conv2d(16, 4, 1)

    def forward(self, x):
        return self.head(F.dropout(self.bn(self.conv(x)).relu(), 0.1, True)) + torch.randn(1).to(x)


@pytest.mark.parametrize("draw", DRAWS)
def test_draws_follow_the_seed_and_leave_the_state(draw):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    with private_random() as own:
        first, second = DRAWS[draw](), DRAWS[draw]()
    assert own.drew and torch.equal(torch.get_rng_state(), state) and not torch.equal(first, second)
    assert torch.equal(first, DRAWS[draw]()) and torch.equal(second, DRAWS[draw]())


def test_generators_of_a_models_own_and_meta_tensors_draw_as_ever():
    state = torch.get_rng_state()
    with private_random() as own:
        mine = torch.randn(3, generator=torch.Generator().manual_seed(1))
        torch.empty(3, device="meta").uniform_()
    assert not own.drew and torch.equal(mine, torch.randn(3, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(torch.get_rng_state(), state)


def test_another_thread_draws_what_it_would_have():
    torch.manual_seed(7)
    expected = torch.randn(2000)
    torch.manual_seed(7)
    go, drawn = threading.Event(), []

    def work():
        with private_random():
            go.set()
            for _ in range(300):
                nn.Linear(8, 8)
                torch.randn(8)

    thread = threading.Thread(target=work)
    thread.start()
    go.wait()
    drawn = [torch.randn(1) for _ in range(2000)]
    thread.join()
    torch.manual_seed(7)
    assert torch.equal(torch.cat(drawn), torch.cat([torch.randn(1) for _ in range(2000)])) and len(expected) == 2000


VERBS = {
    "reparameterize": lambda net, path: rep_plugin.reparameterize(net, X),
    "inplace": lambda net, path: rep_plugin.reparameterize(net, X, inplace=True),
    "expand": lambda net, path: rep_plugin.expand(net, "dbb", example_input=X),
    "online": lambda net, path: rep_plugin.expand(net, "acb", example_input=X, online=True),
    "plan": lambda net, path: rep_plugin.plan_pruning(net, X, "random", 0.3),
    "apply": lambda net, path: rep_plugin.apply_plan(net, rep_plugin.plan_pruning(net, X, "l1", 0.3), verify=False),
}


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_leave_random_states_and_take_models_that_draw(verb, tmp_path):
    net = Noisy().eval()
    calibrate_random_bn_(net, X)
    torch.manual_seed(3)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    VERBS[verb](net, tmp_path)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()


def test_export_and_load_leave_the_random_state(tmp_path):
    def build():
        return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)).eval()

    expanded, _ = rep_plugin.expand(build(), "acb", example_input=X)
    fresh = build()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    rep_plugin.export_onnx(expanded, tmp_path / "net.onnx", X, rounds=1, runtimes=["onnxruntime"])
    rep_plugin.save(expanded, tmp_path / "saved")
    rep_plugin.load(tmp_path / "saved", model=fresh)
    assert torch.equal(torch.get_rng_state(), state)
