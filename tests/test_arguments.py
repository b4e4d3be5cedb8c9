"""Values against annotations: what fits comes back as Python's own, what does not is told in one line."""

import re
import runpy
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pytest
import torch
from torch import nn

from rep_plugin import functional, plan_pruning
from rep_plugin.arguments import Count, Dims, OneOf, Shape, Share, check, checked
from rep_plugin.backbones import RepMobileNetV2
from rep_plugin.commands import COMMANDS
from rep_plugin.errors import ArgumentError, ArgumentTypeError
from tests.attack import _commands
from tests.attack import arguments as attacked
from tests.helpers import ROOT

SCOPE, MAPS = Annotated[str, OneOf(("global", "layer"))], Annotated[torch.Tensor, Dims("(N, C, H, W)")]
FITTING = [
    (Count, 3, 3),
    (Count, np.int64(3), 3),
    (Count, torch.tensor(3), 3),
    (Share, 0.5, 0.5),
    (Share | None, None, None),
    (float, 2, 2),
    (float, np.float32(0.5), 0.5),
    (bool, np.bool_(True), True),
    (str | Path, "a", "a"),
    (SCOPE, "layer", "layer"),
    (Sequence[str], ["a"], ["a"]),
    (Sequence[Count], (np.int64(1), 2), (1, 2)),
    (tuple[int, int], [1, 2], (1, 2)),
    (Mapping[str, float | str], {"a": 1}, {"a": 1}),
    (Callable | None, len, len),
    (torch.device | str | None, "cpu", "cpu"),
    (Literal[1, 3], 3, 3),
    (Mapping[str, float], {"a": torch.tensor(0.5), "b": 1.0}, {"a": 0.5, "b": 1.0}),
    (Shape, torch.Size([1, 3]), (1, 3)),
]
WRONG = [
    (Count, 0, "x must be a whole number >= 1, got 0"),
    (Count, True, "x must be a whole number >= 1, got True"),
    (Count, 2.0, "x must be a whole number >= 1, got 2.0"),
    (Share, float("nan"), r"x must be a number in \(0, 1\), got nan"),
    (float, 10**400, "x must be a number, got an integer of 1,329 bits"),
    (bool, 1, "x must be True or False, got 1"),
    (SCOPE, "glbal", "x must be one of global, layer, got 'glbal', did you mean 'global'"),
    (SCOPE | None, None.__class__, "x must be one of global, layer or None, got the class NoneType"),
    (Sequence[str], "stem", r"x must be a list of strings, got 'stem': write \['stem'\]"),
    (Sequence[str], ["a", 3], r"x\[1\] must be a string, got 3"),
    (Iterable[nn.Module], torch.ones(2), r"x must be a list of torch.nn.Modules, got a Tensor of shape \(2,\)"),
    (tuple[int, int], (1,), r"x must be 2 whole numbers, got \(1,\)"),
    (Mapping[str, float], {"a": None}, r"x\['a'\] must be a number, got None"),
    (Mapping[torch.Tensor, float], {torch.ones(2, 1): None}, r"x\[a Tensor of shape .*\] must be a number, got None"),
    (Mapping[str, float], {3: 1.0}, "x must be a dict of strings and numbers, got {3: 1.0}"),
    (str | Path, "", "x must be a path, got ''"),
    (str | Path, "a\0b", "x must be a path, got"),
    (nn.Module, nn.ReLU, "x must be a torch.nn.Module, got the class ReLU"),
    (MAPS, torch.ones(2), r"x must be a float tensor \(N, C, H, W\), got a Tensor of shape \(2,\)"),
    (torch.device | str, "cud", "x must be a device or a string, got 'cud'"),
    (Shape, (), r"x must be a shape \(N, C, ...\), got \(\)"),
    (Literal[1, 3], 2, "x must be one of 1, 3, got 2"),
]


@pytest.mark.parametrize(("hint", "value", "expected"), FITTING)
def test_what_fits_comes_back_as_pythons_own(hint, value, expected):
    found = check("x", value, hint)
    assert found == expected and not isinstance(found, (np.generic, torch.Tensor))


@pytest.mark.parametrize(("hint", "value", "message"), WRONG)
def test_what_does_not_fit_is_told_in_one_line(hint, value, message):
    with pytest.raises(ArgumentError, match=f"^{message}") as caught:
        check("x", value, hint)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250


def test_a_class_and_a_function_name_a_misspelt_argument():
    with pytest.raises(ArgumentTypeError, match="^RepMobileNetV2 takes no 'widen_facto', did you mean 'widen_factor'"):
        RepMobileNetV2(widen_facto=0.5)
    with pytest.raises(ArgumentTypeError, match="^plan_pruning takes no 'scop', did you mean 'scope'"):
        plan_pruning(nn.Conv2d(3, 4, 1), (1, 3, 8, 8), scop="layer")
    with pytest.raises(ArgumentTypeError, match="^plan_pruning: missing a required argument: 'example_input'"):
        plan_pruning(nn.Conv2d(3, 4, 1))


def test_a_wrong_kind_is_a_type_error_and_a_wrong_number_a_value_error():
    with pytest.raises(TypeError, match="channels"):
        functional.triangle_size("three")
    with pytest.raises(ValueError, match="channels"):
        functional.triangle_size(-1)


def test_nothing_is_done_before_all_is_checked():
    done = []

    @checked
    def work(first: int, *rest: str, last: Count = 1) -> None:
        done.append((first, rest, last))

    work(1, "a", last=np.int64(2))
    for arguments in (("1",), (1, 2)):
        with pytest.raises(ArgumentError):
            work(*arguments)
    with pytest.raises(ArgumentError, match="^last"):
        work(1, last=0)
    assert done == [(1, ("a",), 2)]


def test_every_public_callable_is_attacked_with_wrong_arguments():
    assert not attacked.public_names() - attacked.CALLS.keys()
    assert not _commands.missing()


def test_every_timm_name_is_of_a_family_that_is_attacked():
    families = tuple(name.removeprefix("timm.") for name in attacked.CALLS if name.startswith("timm."))
    assert len(attacked.timm_names()) >= 40
    assert not [name for name in attacked.timm_names() if not name.startswith(families)]


@pytest.mark.parametrize("tool", sorted(path.name for path in (ROOT / "tools").glob("*.py")))
def test_every_tool_is_a_command_with_its_options(tool, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [tool, "--no-such-option"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "tools" / tool), run_name="__main__")
    command = re.search(r"^rep-plugin (\w+): error: ", capsys.readouterr().err, re.M)
    assert stop.value.code == 2 and command[1] in COMMANDS


def test_every_option_is_attacked_with_wrong_words():
    for name, valid in _commands.VALID.items():
        actions = {
            option for action, _, _ in _commands.command_lines(valid) if action for option in action.option_strings
        }
        own = {option for action in _commands.parser_of(valid)._actions for option in action.option_strings}
        assert own - actions == {"-h", "--help"}, name
