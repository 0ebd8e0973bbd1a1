"""From a trigger, a history and the bundle in service to ranked items, with a stated answer for every gap.

What is missing decides the fallback: no history -> `trigger_only`; no (known) trigger item ->
`history_only`; neither, or no model that answers -> `popular`: the bundle's most bought items, then the rest
of the catalogue in the order of their SIDs, scored 0, -1, -2, ... for want of a probability. Without a bundle
that is the order of the SIDs alone. Nothing that may be recommended -> `no_catalog` and no items.
"""

from __future__ import annotations

import itertools
import logging
import struct
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from registry.prompt import prompt_sids
from registry.rollout import assign
from serving.beam import Ranking, search
from serving.bundles import LoadedBundle, Service
from serving.index import SidIndex
from streams import history
from streams.errors import SidstreamError
from streams.events import RankedItem, Recommendation, Trigger
from streams.keys import hashed

log = logging.getLogger(__name__)

Fallback = Literal["popular", "history_only", "trigger_only", "no_catalog"]


@dataclass(frozen=True)
class Request:
    """A trigger and the bytes of its user's history (None: none, or it could not be read)."""

    trigger: Trigger
    history: bytes | None


@dataclass(frozen=True)
class Answer:
    """A recommendation, and what the model let slip while it was made."""

    recommendation: Recommendation
    invalid_mass: tuple[float, ...] = ()
    model_failed: bool = False


@dataclass
class _Case:
    """One request on its way: what it knows of its user and what it must leave out."""

    trigger: Trigger
    index: SidIndex | None
    bundle: LoadedBundle | None
    arm: str | None
    trial: str | None
    prompt: list[tuple[int, ...]] = field(default_factory=list)
    excluded: set[int] = field(default_factory=set)
    fallback: Fallback | None = None


class Recommender:
    """Answers requests; holds no state of its own.

    `indexes(codebook)` is the newest index of a codebook, None where there is none; `indexes(None)` the one
    that stands in while no bundle names a codebook.
    """

    def __init__(
        self, indexes: Callable[[str | None], SidIndex | None], beam: int, repeat: Literal["always", "never"]
    ) -> None:
        self._indexes = indexes
        self._beam = beam
        self._repeat = repeat

    def recommend(self, requests: Sequence[Request], service: Service | None) -> list[Answer]:
        """One answer a request, in order; all requests of one bundle are one call of its model a level."""
        # One snapshot a codebook for the whole call: leaves of two snapshots are not comparable.
        snapshots: dict[str | None, SidIndex | None] = {}
        answers: dict[int, Answer] = {}
        searches: dict[str, list[tuple[int, _Case]]] = {}
        for at, request in enumerate(requests):
            case = self._case(request, service, snapshots)
            if case.bundle is None or case.fallback in ("popular", "no_catalog"):
                answers[at] = _popular(case)
            else:
                searches.setdefault(case.bundle.id, []).append((at, case))
        for group in searches.values():
            found = self._search([case for _, case in group])
            answers.update((at, answer) for (at, _), answer in zip(group, found, strict=True))
        return [answers[at] for at in range(len(requests))]

    def _case(
        self, request: Request, service: Service | None, snapshots: dict[str | None, SidIndex | None]
    ) -> _Case:
        """What a request starts from."""
        trigger = request.trigger
        bundle, arm, trial = None, None, None
        if service is not None:
            chosen = assign(service.rollout.trial, trigger.user_id, service.rollout.arms)
            bundle, arm, trial = service.bundles[chosen.bundle], chosen.name, service.rollout.trial
        codebook = bundle.codebook if bundle else None
        if codebook not in snapshots:
            snapshots[codebook] = self._indexes(codebook)
        index = snapshots[codebook]
        case = _Case(trigger, index, bundle, arm, trial)
        if index is None:
            case.fallback = "no_catalog"
            return case
        opened = index.leaf_of(trigger.item_id) if trigger.item_id is not None else None
        left_out = (index.leaf_of(item) for item in (trigger.item_id, *trigger.exclude) if item is not None)
        case.excluded = {leaf for leaf in left_out if leaf is not None}
        if bundle is None:
            case.fallback = "popular"
            return case
        past = _past(request, bundle)
        if self._repeat == "never":
            case.excluded |= {leaf for sid in past if (leaf := index.leaf_of_sid(sid)) is not None}
        seen = None if opened is None else tuple(index.sid(opened))
        case.prompt = prompt_sids(past, seen, bundle.max_items)
        if not past:
            case.fallback = "popular" if seen is None else "trigger_only"
        elif seen is None:
            case.fallback = "history_only"
        return case

    def _search(self, cases: Sequence[_Case]) -> list[Answer]:
        """One bundle's answers; where its model fails, each request alone, then popular items."""
        bundle, index = cases[0].bundle, cases[0].index
        assert bundle is not None, "a case without a bundle is not searched"
        assert index is not None, "a case without an index is not searched"
        try:
            rankings = search(
                bundle.generator, index,
                [case.prompt for case in cases], [case.excluded for case in cases],
                [case.trigger.k for case in cases], self._beam,
            )  # fmt: skip
        except Exception:  # whatever a model raises, somebody waits for an answer
            if len(cases) > 1:
                return [answer for case in cases for answer in self._search([case])]
            user = hashed(cases[0].trigger.user_id)
            log.exception("bundle %s failed for user %s: popular items instead", bundle.id, user)
            return [_popular(cases[0], model_failed=True)]
        return [_ranked(case, index, ranking) for case, ranking in zip(cases, rankings, strict=True)]


def _past(request: Request, bundle: LoadedBundle) -> list[tuple[int, ...]]:
    """The SIDs of a history, oldest first; none where it is of another codebook or cannot be read."""
    if not request.history:
        return []
    try:
        known = history.decode(request.history)
    except (SidstreamError, struct.error, IndexError) as error:
        user = hashed(request.trigger.user_id)
        log.error("the history of user %s is not used: %s", user, error)
        return []
    if known.codebook_tag != bundle.codebook[: len(known.codebook_tag)]:
        return []
    sizes = bundle.generator.sizes
    return [
        entry.sid
        for entry in known.entries
        if len(entry.sid) == len(sizes)
        and all(code < size for code, size in zip(entry.sid, sizes, strict=True))
    ]


def _ranked(case: _Case, index: SidIndex, ranking: Ranking) -> Answer:
    items = [
        RankedItem(item_id=index.item(leaf), sid=index.sid(leaf), score=float(score))
        for leaf, score in zip(ranking.leaves.tolist(), ranking.scores.tolist(), strict=True)
    ]
    return Answer(_recommendation(case, items, case.fallback), ranking.invalid_mass)


def _popular(case: _Case, model_failed: bool = False) -> Answer:
    """The bundle's most bought items, then the others by SID; active and not excluded, the k first."""
    index = case.index
    leaves: dict[int, None] = {}  # in order, each once
    if index is not None:
        bought = (index.leaf_of(item) for item in (case.bundle.popular if case.bundle else ()))
        for leaf in itertools.chain(bought, map(int, np.flatnonzero(index.active))):
            if len(leaves) == case.trigger.k:
                break
            if leaf is not None and index.active[leaf] and leaf not in case.excluded:
                leaves[leaf] = None
    items = [
        RankedItem(item_id=index.item(leaf), sid=index.sid(leaf), score=float(-rank))
        for rank, leaf in enumerate(leaves)
        if index is not None
    ]
    return Answer(_recommendation(case, items, "popular"), model_failed=model_failed)


def _recommendation(case: _Case, items: list[RankedItem], fallback: Fallback | None) -> Recommendation:
    trigger = case.trigger
    return Recommendation(
        # Event time, the trigger's: a replayed page is answered in its own year.
        schema_version=1, event_id=uuid.uuid4().hex, ts=trigger.ts,
        request_id=trigger.request_id, user_id=trigger.user_id, items=items,
        bundle=case.bundle.id if case.bundle else None, arm=case.arm, trial=case.trial,
        fallback=fallback if items else "no_catalog", scene=trigger.scene, trigger_item_id=trigger.item_id,
    )  # fmt: skip
