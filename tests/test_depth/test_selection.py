"""The selection against trying everything."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from rep_plugin.depth.segments import Segment
from rep_plugin.depth.selection import BEST, TICKS, Choice, Item, best_choices, choices_for, frontier, tick_of
from tests.helpers import examples


def item(number: int, run: int, first: int, last: int, saving: float, loss: float) -> Item:
    shape = (1, 1, 1, 1)
    segment = Segment(str(number), (), (), (), False, (), "", shape, 1, (1, 1), (0, 0), span=(run, first, last))
    return Item(segment, saving, loss)


def every_choice(items: list[Item]) -> list[Choice]:
    """All sets of items that share no layer."""
    found = []
    for size in range(len(items) + 1):
        for chosen in itertools.combinations(items, size):
            if not any(a.segment.overlaps(b.segment) for a, b in itertools.combinations(chosen, 2)):
                found.append(Choice(sum(i.saving for i in chosen), sum(i.loss for i in chosen), chosen))
    return found


SPANS = st.tuples(st.integers(0, 1), st.integers(0, 9), st.integers(0, 4), st.integers(1, 40), st.integers(-3, 30))


@settings(max_examples=examples(100), deadline=None)
@given(st.lists(SPANS, min_size=1, max_size=9), st.floats(0, 1))
def test_the_best_five_are_those_of_all(specs, share):
    items = [item(n, run, a, a + length, float(s), float(loss)) for n, (run, a, length, s, loss) in enumerate(specs)]
    state, all_of_them = best_choices(items), every_choice(items)
    most = max(choice.saving for choice in all_of_them)
    wanted = share * most
    found = choices_for(state, wanted)
    sets = {frozenset(i.segment.name for i in c.items) for c in all_of_them}
    assert all(c.saving >= wanted - 1e-9 and frozenset(i.segment.name for i in c.items) in sets for c in found)
    # Savings are rounded down to ticks: a choice that saves less than this more may be passed over.
    slack = len(items) * tick_of(items)
    exact, roomy = (
        sorted(c.loss for c in all_of_them if c.saving >= least - 1e-9)[:BEST] for least in (wanted, wanted + slack)
    )
    assert found and all(ours >= best for ours, best in zip([c.loss for c in found], exact))
    assert all(ours <= best for ours, best in zip([c.loss for c in found], roomy, strict=False)) and len(found) >= len(
        roomy
    )


def test_the_frontier_is_what_no_other_choice_beats():
    items = [
        item(0, 0, 0, 2, 5.0, 1.0),
        item(1, 0, 2, 4, 9.0, 1.5),
        item(2, 0, 5, 6, 1.0, 4.0),
        item(3, 1, 0, 1, 3.0, 0.1),
    ]
    points = frontier(best_choices(items))
    assert [(round(p.saving), round(p.loss, 9)) for p in points] == [
        (0, 0), (3, 0.1), (5, 1), (8, 1.1), (9, 1.5), (12, 1.6), (13, 5.6),
    ]  # fmt: skip


def test_what_no_choice_saves_is_an_empty_answer():
    state = best_choices([item(0, 0, 0, 2, 5.0, 1.0)])
    assert choices_for(state, 5.1) == [] and len(choices_for(state, 5.0)) == 1 and TICKS > 1000


def test_many_segments_are_chosen_from_at_once():
    items = [item(n, 0, n, n + 2, 1.0 + n % 7, 0.3 + (n * 37 % 11) / 10) for n in range(60)]
    best = choices_for(best_choices(items), 40.0)
    assert len(best) == BEST and best[0].saving >= 40 and [c.loss for c in best] == sorted(c.loss for c in best)
