"""Rules for products of maps with maps: matrix products, einsum and attention.

Where channels lie along a dimension that both factors and the product have, as heads do, whole heads stay or go. Where they
lie along what is summed over, those of one factor go with those of the other. Where they lie along a dimension of one factor
alone, they go on.
"""

import inspect
import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from rep_plugin.pruning.tracing.graph import Mark
from rep_plugin.pruning.tracing.labels import FIXED
from rep_plugin.pruning.tracing.recorder import Recorder
from rep_plugin.pruning.tracing.rules.elementwise_pooling_reduction import tie_maps
from rep_plugin.pruning.tracing.rules.registry import rule


@dataclass
class _Factor:
    """A map, and a letter for each of its dimensions."""

    labels: Tensor
    letters: str
    zero: bool

    def varying(self, recorder: Recorder) -> set[str]:
        return {self.letters[dim] for dim in recorder.channels.varying(self.labels)}

    def tie(self, recorder: Recorder, letters: set[str]) -> None:
        for letter in letters & set(self.letters):
            recorder.channels.tie_along(self.labels, self.letters.index(letter), recorder.operation())

    def along(self, letters: str) -> Tensor:
        """Labels of these dimensions, in this order; of a missing one there is one, of others the first is taken."""
        labels = self.labels
        for dim in reversed(range(labels.dim())):
            if self.letters[dim] not in letters:
                labels = labels.select(dim, 0)
        own = [letter for letter in self.letters if letter in letters]
        labels = labels.permute([own.index(letter) for letter in letters if letter in own])
        for place, letter in enumerate(letters):
            if letter not in own:
                labels = labels.unsqueeze(place)
        return labels


def _multiply(recorder: Recorder, one: _Factor, two: _Factor, out: str) -> tuple[Mark, list[Tensor]] | None:
    """Return the mark of a product, and the channels that its cost depends on; None where it cannot be followed."""
    summed = {letter for letter in one.letters if letter in two.letters and letter not in out}
    for own, other in ((one, two), (two, one)):
        own.tie(recorder, set(own.letters) - set(out) - set(other.letters))  # a sum over one factor alone
    shared = {letter for letter in out if letter in one.letters and letter in two.letters}
    for own in (one, two):
        varying = own.varying(recorder)
        if varying & set(out):  # heads go as a whole, whatever is in them
            own.tie(recorder, varying & summed)
    heads = (one.varying(recorder) | two.varying(recorder)) & shared
    if heads:
        for own in (one, two):
            own.tie(recorder, set(own.letters) - heads)
        letters = "".join(letter for letter in out if letter in heads)
        first, second = one.along(letters), two.along(letters)
        tie_maps(recorder, first, second)
        whole = _Factor(first, letters, one.zero or two.zero)
    else:
        free = [own for own in (one, two) if own.varying(recorder) & set(out)]
        if len(free) == 2:  # heads that share their keys and values lie along a leading dimension
            free = [own for own in free if own.varying(recorder) & set(out[:-2])]
            if len(free) != 1:
                return None
            other = two if free[0] is one else one
            what = f"goes into {recorder.operation()}, for all heads: it needs all of its channels"
            recorder.channels.freeze(other.labels, what)
        if not _sum_over(recorder, one, two, summed):
            return None
        whole = free[0] if free else _Factor(torch.tensor(FIXED), "", False)
    counted = [whole.along(letter) for letter in out if letter in whole.varying(recorder)]
    counted += [one.along(letter) for letter in summed & one.varying(recorder)]
    return Mark(whole.along(out), whole.zero), counted


def _sum_over(recorder: Recorder, one: _Factor, two: _Factor, summed: set[str]) -> bool:
    """Channels that are summed over go from both factors, or from none; return False where they lie along several letters."""
    if any(len(own.varying(recorder) & summed) > 1 for own in (one, two)):
        return False
    for letter in sorted(summed):
        first, second = (own.along(letter) if letter in own.varying(recorder) else None for own in (one, two))
        if first is None and second is None:
            continue
        if first is None or second is None or not (one.zero or two.zero):
            what = f"goes into {recorder.operation()} with a map whose channels stay: it needs all of them"
            for labels in (first, second):
                if labels is not None:
                    recorder.channels.freeze(labels, what)
            continue
        tie_maps(recorder, first, second)
    return True


def _product(recorder: Recorder, out: Tensor, one: Tensor, two: Tensor, letters: tuple[str, str, str]) -> Mark | None:
    factors = []
    for tensor, names in zip((one, two), letters):
        mark, labels = recorder.mark_of(tensor), recorder.mark_of(tensor).labels
        for dim in reversed(range(tensor.dim())):  # what is stretched lies along no dimension of the product
            if tensor.shape[dim] == 1:
                labels, names = labels.select(dim, 0), names[:dim] + names[dim + 1 :]
        factors.append(_Factor(labels, names, mark.zero))
    made = _multiply(recorder, factors[0], factors[1], letters[2])
    if made is None:
        return None
    mark, counted = made
    _count(recorder, counted)
    return Mark(mark.labels.expand(out.shape), mark.zero)


def _count(recorder: Recorder, counted: list[Tensor]) -> None:
    """Add what the function at hand costs, as far as these channels stay."""
    macs, whole = recorder.count_macs(), math.prod(len(labels) for labels in counted)
    recorder.add_cost(counted, lambda *kept: macs * math.prod(kept) // whole)


_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


@rule("matmul", "__matmul__", "bmm", "mm", keeps_open=True)
def _matmul(recorder, out, input, other):
    if min(input.dim(), other.dim()) < 2:
        return None
    lead = _LETTERS[: out.dim() - 2]
    names = [lead[len(lead) - (t.dim() - 2) :] + ends for t, ends in ((input, "XY"), (other, "YZ"))]
    return _product(recorder, out, input, other, (*names, lead + "XZ"))


@rule("__rmatmul__", keeps_open=True)
def _rmatmul(recorder, out, input, other):
    return _matmul(recorder, out, other, input)


@rule("einsum", keeps_open=True)
def _einsum(recorder, out, equation, *operands):
    operands = operands[0] if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else operands
    found = re.fullmatch(r"([a-zA-Z]+),([a-zA-Z]+)->([a-zA-Z]*)", equation.replace(" ", ""))
    if found is None or len(operands) != 2 or any(len(set(names)) < len(names) for names in found.groups()):
        return None
    return _product(recorder, out, *operands, found.groups())


@rule("scaled_dot_product_attention", keeps_open=True)
def _attention(recorder, out, *args, **kwargs):
    given = inspect.signature(_attention_of).bind(*args, **kwargs)
    given.apply_defaults()
    query, key, value, mask, scale = (given.arguments[n] for n in ("query", "key", "value", "attn_mask", "scale"))
    if given.arguments["enable_gqa"]:
        return None
    lead = _LETTERS[: out.dim() - 2]
    if any(t.dim() != out.dim() for t in (query, key, value)):
        return None
    factors = {}
    for name, tensor, ends in (("query", query, "XY"), ("key", key, "ZY"), ("value", value, "ZW")):
        mark = recorder.mark_of(tensor)
        factors[name] = _Factor(mark.labels, lead + ends, mark.zero)
    if scale is None:  # the number of channels in a head is part of it
        for name in ("query", "key"):
            factors[name].tie(recorder, {"Y"})
    weights = _multiply(recorder, factors["query"], factors["key"], lead + "XZ")
    if weights is None:
        return None
    labels = weights[0].labels.expand(*query.shape[:-1], key.shape[-2])
    if mask is not None:
        own = recorder.mark_of(mask).labels
        if recorder.channels.varying(own):
            tie_maps(recorder, labels, own.expand(labels.shape))
    for dim in (-1, -2):
        recorder.channels.tie_along(labels, dim, recorder.operation())
    made = _multiply(recorder, _Factor(labels, lead + "XZ", False), factors["value"], lead + "XW")
    if made is None:
        return None
    _count(recorder, made[1])
    return Mark(made[0].labels.expand(out.shape), made[0].zero)


def _attention_of(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """The arguments of torch's, which has no signature."""
