"""One random network through every verb, each result compared with the fuzzer's own evaluation of the given model.

    python -m tests.attack.nets 17      # its source, and every fault with its traceback

An outcome is ``equal``, or ``refused``: an error of ours, in one line, that leaves the model as it was. Where the forward
decides by a value, and the report says so, the result may differ on another path. All else is a fault: another function,
another error, a changed model, a changed random state, wrong numbers in a report, a mergeable pair that is left without a
note.
"""

import copy
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

import rep_plugin
from rep_plugin.blocks import RepBlock
from rep_plugin.blocks.layers import NormedConv2d
from rep_plugin.errors import RepPluginError
from tests.attack._networks import Network
from tests.attack._oracle import Reference, changed, evaluate, fingerprint, leaves, process_state

SHORT, LONG, FEW, LIMIT_S = 100, 5000, 4, 300.0
AMOUNT = {torch.float64: 1e-12, torch.float32: 1e-6}  # of the noise that stands for rounding
EXPORT_EVERY = 10  # seeds: it is slow
OTHER_PATH = "equal on the path that the report names"
DRAWS = {"expand", "load"}  # new branches start at random kernels


class Attack:
    """Runs the verbs on one network, and counts and collects what came out."""

    def __init__(self, seed: int, folder: Path, verbose: bool = False):
        self.network = Network(seed)
        self.seed, self.folder, self.verbose = seed, folder, verbose
        self.rng = random.Random(seed + 1)
        self.counts: Counter = Counter(nets=1)
        self.faults: list[str] = []
        self.seconds: Counter = Counter()
        self.model = self.network.build()
        self.x = torch.randn(
            self.rng.choice((1, 2, 3)), *self.network.shape, generator=torch.Generator().manual_seed(seed)
        ).to(self.network.dtype)
        self.reference = self.refer(self.model)

    def refer(self, model: nn.Module, count: int = 7) -> Reference:
        return Reference(model, self.network.shape, AMOUNT[self.network.dtype], count)

    def fault(self, verb: str, text: str) -> None:
        self.faults.append(f"{verb}: {text}")
        if self.verbose:
            print(f"FAULT {self.faults[-1]}")

    def attempt(self, verb: str, model: nn.Module, function: Callable[[], object], inplace: bool = False) -> object:
        """Run a verb on a model that stays as it is where an error is raised, or where it is not worked on in place."""
        start, before, process = time.perf_counter(), fingerprint(model), process_state()
        result, error = None, None
        try:
            result = function()
        except RepPluginError as raised:
            error = raised
            if "\n" in str(raised) or not str(raised):
                self.fault(verb, f"the message is not one line: {raised!r}")
        except Exception as raised:
            error = raised
            self.fault(verb, f"{type(raised).__name__}: {raised}")
            if self.verbose:
                traceback.print_exc()
        self.seconds[verb.split()[0]] += time.perf_counter() - start
        state = process_state()
        allowed = {"torch random state"} if verb.split()[0] in DRAWS or self.network.draws else set()
        if wrong := [key for key in state if state[key] != process[key] and key not in allowed]:
            self.fault(verb, f"the process has another {wrong[0]}")
        if (error is not None or not inplace) and (what := changed(before, fingerprint(model))):
            self.fault(verb, f"the given model was changed: {what}")
        if isinstance(error, RepPluginError):
            self.count(verb, "refused")
            if self.verbose:
                print(f"{verb}: refused: {type(error).__name__}: {error}")
        return result

    def count(self, verb: str, outcome: str) -> None:
        self.counts[outcome] += 1
        self.counts[f"{verb.split()[0]} {outcome}"] += 1

    def judge(
        self, verb: str, reference: Reference, model: nn.Module, report=None, given: nn.Module | None = None
    ) -> bool:
        """Compare a result, and the numbers of its report."""
        wrong = reference.compare(model)
        if wrong and decides(report):
            self.count(verb, OTHER_PATH)
        elif wrong:
            notes = f" (notes: {report.notes})" if report is not None and report.notes else ""
            self.fault(verb, f"{wrong}{notes}")
        else:
            self.count(verb, "equal")
        if report is not None:
            self.check_report(verb, report, model, given)
        if self.verbose:
            print(f"{verb}: {wrong or 'equal'}; {getattr(report, 'notes', '')}")
            if verb == "merge_sequence":
                print(reference.model)
        return not wrong

    def check_report(self, verb: str, report, model: nn.Module, given: nn.Module | None) -> None:
        params = sum(p.numel() for p in model.parameters())
        if report.params_after != params:
            self.fault(verb, f"report.params_after is {report.params_after}, counted {params}")
        if given is not None and report.params_before != (before := sum(p.numel() for p in given.parameters())):
            self.fault(verb, f"report.params_before is {report.params_before}, counted {before}")
        if report.max_rel_error is None or not report.max_rel_error <= 1e-9:
            self.fault(verb, f"report.max_rel_error is {report.max_rel_error}")
        if any("\n" in note for note in report.notes):
            self.fault(verb, "a note is not one line")
        report.to_json()

    # The verbs

    def run(self) -> None:
        self.merge(self.model, self.reference, fold_bn=True)
        self.merge(self.model, self.reference, fold_bn=self.rng.random() < 0.3)
        self.expand()
        self.prune()
        self.merge_sequence()
        if self.seed % EXPORT_EVERY == 0:
            self.export()

    def merge(self, model: nn.Module, reference: Reference, fold_bn: bool, name: str = "merge") -> None:
        options = dict(fold_bn=fold_bn, merge_linear=self.rng.random() < 0.4, inplace=self.rng.random() < 0.3)
        verb, given = f"{name} {options}", copy.deepcopy(model)
        example = self.x.clone()
        done = self.attempt(
            verb, given, lambda: rep_plugin.reparameterize(given, example, **options), inplace=options["inplace"]
        )
        if not torch.equal(example, self.x):
            self.fault(verb, "the example input was changed")
        if done is None:
            return
        merged, report = done
        if self.judge(verb, reference, merged, report, model):
            self.check_notes(verb, merged, report, fold_bn)
            self.save(f"save after {verb}", merged)

    def check_notes(self, verb: str, merged: nn.Module, report, fold_bn: bool) -> None:
        """What could have been merged and was not must be told."""
        if report.notes:
            return
        for name, module in merged.named_modules():
            if isinstance(module, RepBlock) and not module.deployed:
                self.fault(verb, f"block {name!r} is left without a note")
        for conv, bn in self.network.pairs if fold_bn else ():
            conv, bn = (eval(code, {"self": merged}) for code in (conv, bn))
            plain = type(conv) is nn.Conv2d and type(bn) is nn.BatchNorm2d and conv.padding_mode == "zeros"
            if plain and bn.running_var is not None and not isinstance(conv.padding, str):
                self.fault(verb, f"a convolution and its BN ({bn}) are left without a note")

    def merge_sequence(self) -> None:
        """Linear layers in a row, some of which compute something else."""
        layers = self.network.build_sequence(self.rng)
        shape = (next(m for m in layers.modules() if isinstance(m, nn.Conv2d)).in_channels, 11, 14)
        verb, given = "merge_sequence", layers if self.rng.random() < 0.5 else [*layers]
        merged = self.attempt(verb, layers, lambda: rep_plugin.merge_sequence(given))
        if merged is not None:
            self.judge(verb, Reference(layers, shape, AMOUNT[self.network.dtype], 5), merged)

    def expand(self) -> None:
        rng, given = self.rng, copy.deepcopy(self.model)
        options = dict(block=rng.choice(("dbb", "acb", "repvgg", "mobileone")), inplace=rng.random() < 0.3)
        options["online"] = rng.random() < 0.2
        verb, example = f"expand {options}", self.x.clone()
        done = self.attempt(
            verb, given, lambda: rep_plugin.expand(given, example_input=example, **options), options["inplace"]
        )
        if done is None:
            return
        expanded, report = done
        if not self.judge(verb, self.reference, expanded, report, self.model):
            return
        self.save(f"save after {verb}", expanded)
        if self.train(copy.deepcopy(self.model)) is None:
            if (error := self.train(expanded)) is not None:
                self.fault(verb, f"a training step fails: {error}")
                return
            self.merge(expanded, self.refer(expanded, 3), fold_bn=rng.random() < 0.5, name="merge_expanded")

    def train(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> str | None:
        """One step; return the error where a network cannot be trained."""
        modes = {module: module.training for module in model.modules()}
        model.train()
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = optimizer or torch.optim.SGD(parameters, 0.01)
        x = torch.randn(4, *self.network.shape, generator=torch.Generator().manual_seed(5)).to(self.network.dtype)
        try:
            with torch.random.fork_rng():
                floats = [leaf for _, leaf in leaves(model(x)) if leaf.requires_grad]
                sum(leaf.square().mean() for leaf in floats).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        finally:
            optimizer.zero_grad()
            for module, mode in modes.items():
                module.training = mode
        if not all(torch.isfinite(p).all() for p in model.parameters()):
            return "not finite"
        return None

    def prune(self) -> None:
        rng, given = self.rng, copy.deepcopy(self.model)
        budget = rng.choice(
            (
                dict(prune_fraction=rng.uniform(0.05, 0.8)),
                dict(macs=rng.uniform(0.3, 0.9)),
                dict(params=rng.uniform(0.3, 0.9)),
            )
        )
        options = budget | dict(
            scores=rng.choice(("l1", "l2", "fpgm", "random", "bn_gamma")),
            scope=rng.choice(("global", "layer")),
            min_channels=rng.choice((1, 2, None)),
            round_to=rng.choice((1, 1, 2)),
        )
        verb = f"plan {options}"
        plan = self.attempt(verb, given, lambda: rep_plugin.plan_pruning(given, self.x.clone(), **options))
        if plan is None:
            return
        if rep_plugin.PrunePlan.from_json(plan.to_json()) != plan:
            self.fault(verb, "the plan is another one after JSON")
        self.count(verb, "equal")
        optimizer = None
        if any(p.requires_grad for p in given.parameters()) and rng.random() < 0.5:
            optimizer = torch.optim.SGD([p for p in given.parameters() if p.requires_grad], 0.01, momentum=0.9)
            if self.train(given, optimizer) is not None:
                given, optimizer = copy.deepcopy(self.model), None
        verb, before = f"prune {options}", copy.deepcopy(given)
        report = self.attempt(verb, given, lambda: rep_plugin.apply_plan(given, plan, optimizer), inplace=True)
        if report is None:
            return
        if self.network.draws:  # other random numbers for fewer channels
            return
        try:
            masked = mask(before, plan)
        except AssertionError as error:
            self.fault(verb, str(error))
            return
        if not self.judge(verb, self.refer(masked), given, report, before):
            return
        if not any(self.network.source.count(word) for word in ("RepVGG", "Block", "Conv2d(", "RepInv")):
            return
        if optimizer is not None:
            own = set(given.parameters())
            if not all(p in own for group in optimizer.param_groups for p in group["params"]):
                self.fault(verb, "the optimizer holds parameters that are not the model's")
            if (error := self.train(given, optimizer)) is not None:
                self.fault(verb, f"the optimizer's next step fails: {error}")
                return
        self.save(f"save after {verb}", given)
        self.merge(given, self.refer(given, 3), fold_bn=rng.random() < 0.5, name="merge_pruned")

    def save(self, verb: str, model: nn.Module) -> None:
        """A folder gives the same model back, bit by bit."""
        if self.rng.random() < 0.5:
            return
        folder = self.folder / str(len(list(self.folder.iterdir())))
        if self.attempt(verb, model, lambda: rep_plugin.save(model, folder) or True) is None:
            return
        verb = verb.replace("save", "load", 1)
        fresh = self.network.build()
        loaded = self.attempt(verb, fresh, lambda: rep_plugin.load(folder, fresh), inplace=True)
        if loaded is None:
            return
        for ours, theirs in zip(model.modules(), loaded.modules()):
            theirs.training = ours.training
        ours, theirs = model.state_dict(), loaded.state_dict()
        if list(ours) != list(theirs) or not all(torch.equal(ours[key], theirs[key]) for key in ours):
            self.fault(verb, "the state is another one")
            return
        for x in (self.x, self.x[:1] * 30):
            x = x.to(next(model.parameters()).dtype)
            a, b = evaluate(model, x), evaluate(loaded, x)
            if list(a) != list(b) or not all(torch.equal(a[key].nan_to_num(), b[key].nan_to_num()) for key in a):
                self.fault(verb, "the outputs are others")
                return
        self.count(verb, "equal")

    def export(self) -> None:
        """An ONNX file, run by ONNX Runtime on batches, sizes and scales that the export has not compared."""
        import numpy
        import onnxruntime

        given, path = copy.deepcopy(self.model).float(), self.folder / "model.onnx"
        batch, size = self.rng.random() < 0.7, self.rng.random() < 0.4
        options = dict(dynamic_batch=batch, dynamic_size=size, runtimes=["onnxruntime"], rounds=0)
        verb, x = f"export {options}", self.x.float()
        report = self.attempt(verb, given, lambda: rep_plugin.export_onnx(given, path, x, **options))
        if report is None:
            return
        session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
        reference = Reference(given, self.network.shape, 3e-6)
        for index, (x, expected) in enumerate(zip(reference.inputs, reference.outputs)):
            same = x.shape[1:] == self.x.shape[1:]
            if (not batch and len(x) != len(self.x)) or (not size and not same) or x.abs().max() > 200:
                continue
            got = session.run(None, {session.get_inputs()[0].name: x.float().numpy()})
            floats = {path: leaf for path, leaf in expected.items() if leaf.is_floating_point()}
            named = {path: torch.from_numpy(numpy.asarray(out)).double() for path, out in zip(floats, got)}
            named = {path: settled(out, floats[path]) for path, out in named.items()}
            if (wrong := reference.judge(index, named, floats)) and decides(report):
                self.count(verb, OTHER_PATH)
                return
            if wrong:
                where = f"on {tuple(x.shape)} of up to {x.abs().max():.2g}"
                self.fault(verb, f"{where}: {wrong} (notes: {report.notes})")
                return
        self.count(verb, "equal")


def settled(out: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """What a runtime gave, without what its float32 may lose: its sigmoid is cut off at 18, 1.5e-8 of its range."""
    if out.shape != expected.shape:
        return out
    expected = expected.double()
    return torch.where((out - expected).abs() <= 1e-6 * expected.abs().max(), expected, out)


def decides(report) -> bool:
    """Whether a report says that the forward decides by a value."""
    return any("the forward decides by a value" in note for note in getattr(report, "notes", ()))


def normalise_kept(kept: torch.Tensor, norm: nn.LayerNorm, args: tuple, output: torch.Tensor) -> torch.Tensor:
    """What a layer norm gives of the channels that stay alone; the others are zero."""
    bias = None if norm.bias is None else norm.bias[kept]
    found = nn.functional.layer_norm(args[0][..., kept], (len(kept),), norm.weight[kept], bias, norm.eps)
    return torch.zeros_like(output).index_copy(-1, kept, found)


def normalise_groups(kept: torch.Tensor, norm: nn.GroupNorm, args: tuple, output: torch.Tensor) -> torch.Tensor:
    """What a group norm gives of the channels that stay alone; the others are zero."""
    found = nn.functional.group_norm(args[0][:, kept], norm.num_groups, norm.weight[kept], norm.bias[kept], norm.eps)
    return torch.zeros_like(output).index_copy(1, kept, found)


def mask(model: nn.Module, plan: rep_plugin.PrunePlan) -> nn.Module:
    """The masked model: numbers that surgery takes away are zero, found by numbering every element before the surgery.

    Asserts that the layers of the plan keep the channels that the plan names.
    """
    numbered, masked = copy.deepcopy(model).double(), copy.deepcopy(model)
    with torch.no_grad():
        for tensor in numbered.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.arange(tensor.numel(), dtype=torch.float64).view(tensor.shape))
        rep_plugin.apply_plan(numbered, plan, verify=False)
        after = numbered.state_dict()
        for name, tensor in masked.state_dict().items():
            if name not in after or after[name].shape == tensor.shape or name.endswith("running_var"):
                continue
            left = after[name].flatten()
            if name.endswith("gain") or not torch.equal(left, left.round()):
                continue  # of filters that are normalised: recomputed
            gone = torch.ones(tensor.numel(), dtype=torch.bool)
            gone[left.long()] = False
            tensor.masked_fill_(gone.view(tensor.shape), 0.0)
        for name, module in masked.named_modules():
            if isinstance(module, NormedConv2d):  # the filters that are in effect lose columns, not the raw ones
                before, now = (
                    conv.weight.double().square().sum((1, 2, 3)) + conv.eps
                    for conv in (model.get_submodule(name), module)
                )
                module.gain.mul_(torch.sqrt(now / before))
            if isinstance(module, nn.LayerNorm) and len(kept := after[f"{name}.weight"].long()) < len(module.weight):
                module.register_forward_hook(partial(normalise_kept, kept))  # zeros would count in its mean
            if isinstance(module, nn.GroupNorm) and module.affine:
                kept = after[f"{name}.weight"].long()
                if len(kept) < module.num_channels:
                    module.register_forward_hook(partial(normalise_groups, kept))
    for name, kept in plan.kept.items():
        weight, new = dict(model.named_parameters()).get(f"{name}.weight"), after.get(f"{name}.weight")
        if weight is not None and weight.dim() == 4 and not isinstance(model.get_submodule(name), nn.ConvTranspose2d):
            rows = (new[:, 0, 0, 0] // weight[0].numel()).long().tolist()
            assert rows == list(kept), f"layer {name!r} keeps {rows}, the plan says {list(kept)}"
    return masked


def attack(seed: int, folder: Path) -> Counter:
    """One network through all verbs.

    Args:
        seed: of the network and of all that is chosen.
        folder: for files.

    Returns:
        Counts by outcome, and by verb and outcome.

    Raises:
        AssertionError: there are faults.
    """
    attacked = Attack(seed, folder)
    attacked.run()
    assert not attacked.faults, " | ".join(attacked.faults)
    return attacked.counts


def show(seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        attacked = Attack(seed, Path(folder), verbose=True)
        print(attacked.network.source)
        print(attacked.network.shape, attacked.network.dtype, attacked.network.style, attacked.network.kinds)
        attacked.run()
        print(dict(attacked.counts), {verb: round(seconds, 2) for verb, seconds in attacked.seconds.items()})


if __name__ == "__main__":
    torch.set_num_threads(1)
    show(int(sys.argv[1]))
