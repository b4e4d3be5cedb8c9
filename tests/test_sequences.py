"""Random orders of verbs: each ends in a folder that loads bit for bit, or in a refusal that leaves the model as it was.

``SEQUENCES`` is how many are run, ``FIRST`` the first seed (`make sequences`); a failure names its seed and its steps.
"""

import copy
import json
import os
import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torchvision
from torch import nn

import rep_plugin
from rep_plugin.blocks.families import RepVGGBlock
from rep_plugin.errors import RepPluginError
from rep_plugin.history import history_of
from rep_plugin.testing import calibrate_random_bn_

COUNT, FIRST = int(os.environ.get("SEQUENCES", "24")), int(os.environ.get("FIRST", "0"))
X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
BLOCKS = ("dbb", "acb", "repvgg", "mobileone")


@dataclass
class Family:
    """How models of one kind are built, and where their classifier is (None: none, "timm": as timm's models say)."""

    build: Callable[[random.Random], Callable[[], nn.Module]]
    classifier: str | None = "timm"
    part: str | None = None

    @property
    def by_name(self) -> bool:
        return self.classifier == "timm" or self.classifier is None


def of_timm(name: str, **options) -> Callable[[random.Random], Callable[[], nn.Module]]:
    def choose(rng: random.Random) -> Callable[[], nn.Module]:
        more = {"in_chans": 3}
        if "features_only" not in options:
            more["num_classes"] = rng.choice((3, 10))
        if "mobilenet" in name and not name.startswith("rep_"):
            more["drop_path_rate"] = rng.choice((0.0, 0.2))
        return lambda: timm.create_model(name, **(options | more))

    return choose


def small_net() -> nn.Module:
    net = nn.Sequential()
    net.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    net.body = nn.Sequential(RepVGGBlock(8, 16, 3, 2, act=nn.ReLU()), RepVGGBlock(16, 16, act=nn.ReLU()))
    net.last = nn.Sequential(nn.Conv2d(16, 24, 3, 1, 1), nn.BatchNorm2d(24), nn.ReLU())
    net.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net.fc = nn.Linear(24, 5)
    return net


UNET = dict(encoder_weights=None, decoder_channels=(24, 16, 16, 8, 8), classes=2)
FAMILIES = {
    "resnet18": Family(of_timm("resnet18", channels=(8, 12, 16, 24))),
    "mobilenetv2_035": Family(of_timm("mobilenetv2_035")),
    "rep_mobilenetv2_035": Family(of_timm("rep_mobilenetv2_035")),
    "rep_repvgg": Family(of_timm("rep_repvgg_a0", arch={"depths": [1, 2, 2, 1], "widths": [0.25, 0.25, 0.25, 0.5]})),
    "features_only": Family(
        of_timm("resnet18", channels=(8, 12, 16, 24), features_only=True, out_indices=[1, 3]), None
    ),
    "torchvision": Family(lambda rng: lambda: torchvision.models.mobilenet_v2(width_mult=0.25), "classifier.1"),
    "smp": Family(lambda rng: lambda: smp.Unet("mobilenet_v2", **UNET), "segmentation_head.0", part="encoder"),
    "own": Family(lambda rng: small_net, "fc", part="body"),
}


def outputs(model: nn.Module) -> list[torch.Tensor]:
    with torch.no_grad():
        given = model(X.to(next(model.parameters()).dtype))
    return list(given) if isinstance(given, (list, tuple)) else [given]


def assert_same(one, other) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)
    assert all(torch.equal(a, b) for a, b in zip(outputs(one), outputs(other), strict=True))


class Sequence:
    """One random sequence of steps on one model."""

    def __init__(self, seed: int, folder):
        self.rng = rng = random.Random(seed)
        torch.manual_seed(seed)
        self.name = rng.choice(list(FAMILIES))
        self.family = FAMILIES[self.name]
        self.build = self.family.build(rng)
        self.model = calibrate_random_bn_(self.build().eval(), X, seed)
        self.folder, self.done, self.refused = folder, [self.name], 0

    def run(self) -> None:
        verbs = [self.expand, self.train, self.prune, self.merge, self.merge, self.prune, self.save]
        verbs += [self.classifier] if self.family.classifier else []
        verbs += [self.part] if self.family.part else []
        for _ in range(self.rng.randint(2, 6)):
            verb = self.rng.choice(verbs)
            self.done.append(verb.__name__)
            if verb == self.save:  # is never refused
                verb()
            else:
                self.attempt(verb)
        self.save()

    def attempt(self, verb: Callable[[], None]) -> None:
        model, before = self.model, copy.deepcopy(self.model)
        expected, history = outputs(model), history_of(model)
        try:
            verb()
        except RepPluginError as error:
            self.done[-1] += f" (refused: {error})"
            self.refused += 1
            assert self.model is model and "\n" not in str(error)
            assert_same(before, model)
            assert all(torch.equal(a, b) for a, b in zip(expected, outputs(model), strict=True))
            assert history_of(model) == history

    def expand(self, part: str = "") -> None:
        target = self.model.get_submodule(part)
        convs = [name for name, module in target.named_modules() if isinstance(module, nn.Conv2d)]
        where = self.rng.choice((None, self.rng.sample(convs, max(1, len(convs) // 2))))
        block, inplace = self.rng.choice(BLOCKS), self.rng.random() < 0.5
        self.done[-1] += f" {part} {block} {where and len(where)} {inplace}"
        self.put(part, rep_plugin.expand(target, block, inplace, where, None if part else X)[0])

    def merge(self, part: str = "") -> None:
        fold, linear, inplace = (self.rng.random() < share for share in (0.5, 0.2, 0.5))
        options = dict(inplace=inplace, verify=self.rng.random() < 0.3, fold_bn=fold, merge_linear=linear)
        self.done[-1] += f" {options}"
        example = None if part else X
        self.put(part, rep_plugin.reparameterize(self.model.get_submodule(part), example, **options)[0])

    def put(self, part: str, made: nn.Module) -> None:
        if not part:
            self.model = made
        else:
            self.model.set_submodule(part, made)

    def part(self) -> None:
        self.rng.choice((self.expand, self.merge))(self.family.part)

    def prune(self) -> None:
        scores, fraction = self.rng.choice(("l1", "bn_gamma", "random")), self.rng.uniform(0.05, 0.6)
        scope = self.rng.choice(("global", "layer"))
        plan = rep_plugin.plan_pruning(self.model, X, scores, fraction, scope=scope, min_channels=2)
        rep_plugin.apply_plan(self.model, plan, verify=self.rng.random() < 0.3, example_input=X)

    def train(self) -> None:
        self.model.train()
        optimizer = torch.optim.SGD(self.model.parameters(), 0.01)
        given = self.model(X.to(next(self.model.parameters()).dtype))
        sum(y.square().mean() for y in (given if isinstance(given, list) else [given])).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        optimizer.step()
        self.model.zero_grad()
        self.model.eval()

    def classifier(self) -> None:
        classes = self.rng.choice((2, 4, 7))
        if self.family.classifier == "timm":
            self.model.reset_classifier(classes, self.rng.choice((None, "avg", "max")))
            return
        old = self.model.get_submodule(self.family.classifier)
        if isinstance(old, nn.Linear):
            new: nn.Module = nn.Linear(old.in_features, classes)
        else:
            new = nn.Conv2d(old.in_channels, classes, old.kernel_size, padding=old.padding)
        self.model.set_submodule(self.family.classifier, new)
        self.model.eval()

    def save(self) -> None:
        rep_plugin.save(self.model, self.folder)
        torch.manual_seed(self.rng.randrange(1000))
        loaded = rep_plugin.load(self.folder, None if self.family.by_name else self.build()).eval()
        assert_same(self.model, loaded)
        ours, theirs = (json.loads(json.dumps(history_of(model))) for model in (self.model, loaded))
        assert theirs[len(theirs) - len(ours) :] == ours  # what was replaced before the first step comes in front
        self.model = loaded  # what comes next is done to what was loaded


@pytest.mark.parametrize("start", range(FIRST, FIRST + COUNT, 10))
def test_sequences_of_verbs(start, tmp_path):
    for seed in range(start, min(start + 10, FIRST + COUNT)):
        sequence = Sequence(seed, tmp_path / str(seed))
        try:
            sequence.run()
        except Exception as error:
            error.add_note(f"seed {seed} (FIRST={seed} SEQUENCES=1): {'; '.join(sequence.done)}")
            raise
        print(f"seed {seed}: {sequence.refused} refused: {'; '.join(sequence.done)}")
