"""What the preference pairs look like: how many, how old, how near in codes, and where they contradict."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from streams.errors import SidstreamError
from streams.events import PreferencePair
from trainer.codebooks.report import code_spread, round_floats
from trainer.log.pair_filter import FilteredPairs

# Items named of the chosen side, and spans of time that pairs are counted in.
_TOP_ITEMS = 10
_TIME_SPANS = 48


@dataclasses.dataclass(frozen=True)
class Distribution:
    """How a number is spread over pairs."""

    mean: float
    median: float
    p90: float
    most: int


@dataclasses.dataclass(frozen=True)
class PairGroup:
    """The pairs of one scheme under one codebook."""

    codebook: str
    scheme: str
    pairs: int
    users: int
    rejected: Distribution  # rejected items a pair
    history: Distribution  # SIDs of a pair's history
    # Share of rejected SIDs whose first code is the chosen SID's, whose first two are, ..., and all codes.
    shared: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Ages:
    """Milliseconds from pairs to now."""

    newest: int
    median: float
    oldest: int


@dataclasses.dataclass(frozen=True)
class WithdrawnPairs:
    """What late purchases and clicks in the trainer's log contradict; see `trainer.log.pair_filter`."""

    bought: int
    clicked: int
    same: int
    gone: int


@dataclasses.dataclass(frozen=True)
class Timeline:
    """Pairs of each scheme in spans of equal length; `edges` in ms, one more than counts."""

    edges: tuple[float, ...]
    counts: dict[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class PairsReport:
    """What `sidstream pairs report` tells; each pair counts once."""

    pairs: int
    repeats: int  # records of a pair that was there already
    users: int
    age_ms: Ages
    chosen_items: int  # distinct items that were chosen
    rejected_items: int
    chosen_also_rejected: float  # share of the chosen items that were rejected in some pair, of any user
    rejected_also_chosen: float
    gini: float  # of pairs over chosen items; 0: all as often, near 1: one is nearly always the chosen one
    top: tuple[tuple[str, int], ...]  # the items chosen most often, and in how many pairs
    withdrawn: WithdrawnPairs | None  # None: nothing was logged to hold the pairs against
    groups: tuple[PairGroup, ...]  # largest first
    timeline: Timeline
    ages_ms: tuple[float, ...]  # percentiles 0 to 100

    def as_dict(self) -> dict[str, Any]:
        """Plain values, rounded to four places, for JSON; without what is only drawn."""
        fields: dict[str, Any] = round_floats(dataclasses.asdict(self))
        del fields["timeline"], fields["ages_ms"]
        return fields


def pairs_report(
    pairs: Sequence[PreferencePair], now_ms: int, withdrawal: FilteredPairs | None = None
) -> PairsReport:
    """Measure the pairs as they were written; a repeated event_id counts once.

    `withdrawal` is what `trainer.log.pair_filter.withdraw_contradicted` made of them. Raises SidstreamError
    where there are no pairs.
    """
    distinct_pairs = list({pair.event_id: pair for pair in pairs}.values())
    if not distinct_pairs:
        raise SidstreamError(
            "there are no preference pairs: they are written when attribution windows of purchases close; "
            "see that `sidstream agents` runs and that purchases arrive"
        )
    groups: dict[tuple[str, str], list[PreferencePair]] = {}
    for pair in distinct_pairs:
        groups.setdefault((pair.codebook, pair.scheme), []).append(pair)
    chosen = Counter(pair.chosen_item for pair in distinct_pairs)
    rejected = {item for pair in distinct_pairs for item in pair.rejected_items}
    both = len(rejected & chosen.keys())
    ages = now_ms - np.array([pair.ts for pair in distinct_pairs], dtype=np.int64)
    choices = np.repeat(np.arange(len(chosen)), list(chosen.values()))
    pair_groups = [
        _group(codebook, scheme, group_pairs) for (codebook, scheme), group_pairs in groups.items()
    ]
    return PairsReport(
        pairs=len(distinct_pairs),
        repeats=len(pairs) - len(distinct_pairs),
        users=len({pair.user_id for pair in distinct_pairs}),
        age_ms=Ages(int(ages.min()), float(np.median(ages)), int(ages.max())),
        chosen_items=len(chosen),
        rejected_items=len(rejected),
        chosen_also_rejected=both / len(chosen),
        rejected_also_chosen=both / len(rejected),
        gini=code_spread(choices, len(chosen)).gini,
        top=tuple(
            sorted(chosen.items(), key=lambda item_count: (-item_count[1], item_count[0]))[:_TOP_ITEMS]
        ),
        withdrawn=None
        if withdrawal is None
        else WithdrawnPairs(
            withdrawal.bought, withdrawal.clicked, withdrawal.equal_to_chosen, withdrawal.without_rejected
        ),
        groups=tuple(sorted(pair_groups, key=lambda group: (-group.pairs, group.codebook, group.scheme))),
        timeline=_timeline(distinct_pairs),
        ages_ms=tuple(np.percentile(ages, range(101)).tolist()),
    )


def _group(codebook: str, scheme: str, pairs: Sequence[PreferencePair]) -> PairGroup:
    levels = max(len(pair.chosen) for pair in pairs)
    shares = np.zeros(levels + 1, dtype=np.int64)  # rejected SIDs by how many leading codes they share
    for pair in pairs:
        for sid in pair.rejected:
            shares[_shared_prefix_length(pair.chosen, sid)] += 1
    at_least = shares[::-1].cumsum()[::-1]
    return PairGroup(
        codebook, scheme, len(pairs), len({pair.user_id for pair in pairs}),
        rejected=_distribution(len(pair.rejected) for pair in pairs),
        history=_distribution(len(pair.history) for pair in pairs),
        shared=tuple((at_least[1:] / at_least[0]).tolist()),
    )  # fmt: skip


def _shared_prefix_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Leading codes that are the same."""
    length = 0
    for code, other_code in zip(first, second, strict=False):
        if code != other_code:
            break
        length += 1
    return length


def _distribution(numbers: Iterable[int]) -> Distribution:
    values: npt.NDArray[np.int64] = np.fromiter(numbers, dtype=np.int64)
    median, p90 = np.percentile(values, (50, 90)).tolist()
    return Distribution(float(values.mean()), median, p90, int(values.max()))


def _timeline(pairs: Sequence[PreferencePair]) -> Timeline:
    stamps = np.array([pair.ts for pair in pairs], dtype=np.float64)
    edges = np.linspace(stamps.min(), max(stamps.max(), stamps.min() + 1), _TIME_SPANS + 1)
    schemes = np.array([pair.scheme for pair in pairs])
    counts = {
        name: tuple(np.histogram(stamps[schemes == name], bins=edges)[0].tolist())
        for name in sorted(set(schemes.tolist()))
    }
    return Timeline(tuple(edges.tolist()), counts)
