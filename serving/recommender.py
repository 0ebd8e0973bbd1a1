"""From a trigger, its user and the bundle in service to ranked items, with a stated answer for every gap.

What is missing decides the fallback: no history -> `trigger_only`; no (known) trigger item ->
`history_only`; neither, or no model that answers -> `popular`: the bundle's most bought items, then the rest
of the catalogue in the order of their SIDs, scored 0, -1, -2, ... for want of a probability. Without a bundle
that is the order of the SIDs alone. Nothing that may be recommended -> `no_catalog` and no items.

What a model ranked is its answer as it stands, but for the requests that are explored: there the first item
is drawn from the best (serving.exploration), and the others follow in their order.
"""

from __future__ import annotations

import itertools
import logging
import math
import struct
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from time import perf_counter
from typing import Literal

import msgspec
import numpy as np

from registry.bundles.context import told
from registry.bundles.prompt import prompt_sids
from registry.bundles.ranking import Repeats, left_out
from registry.bundles.rewards import said
from registry.releases.rollout import arm_of
from serving.bundles import LoadedBundle, Service
from serving.decoding.beam import Dense, Ranking, search
from serving.decoding.index import SidIndex
from serving.exploration import Explorer, draw
from streams.errors import SidstreamError
from streams.events import Arm, Exploration, RankedItem, Recommendation, Trigger, encode
from streams.state import profile
from streams.state.history import PURCHASE, HistoryEntry
from streams.state.keys import anonymous_user
from streams.state.translation import TranslateSid, entries_under

log = logging.getLogger(__name__)

Fallback = Literal["popular", "history_only", "trigger_only", "no_catalog"]


@dataclass(frozen=True)
class Request:
    """A trigger and the bytes of its user's history and profile (None: none, or it could not be read)."""

    trigger: Trigger
    history: bytes | None
    profile: bytes | None = None


@dataclass(frozen=True)
class Answer:
    """A recommendation, and what the model let slip while it was made.

    `model_s`: seconds of the model's call, which all requests of a bundle share; None: no model was asked,
    or nothing was left for it to rank.
    `exploration`: what the first item was drawn from, where it was.
    """

    recommendation: Recommendation
    invalid_mass: tuple[float, ...] = ()
    model_failed: bool = False
    model_s: float | None = None
    exploration: Exploration | None = None


@dataclass
class _Case:
    """One request on its way: what it knows of its user and what it must leave out."""

    trigger: Trigger
    index: SidIndex | None
    bundle: LoadedBundle | None
    arm: str | None
    trial: str | None
    prompt: list[tuple[int, ...]] = field(default_factory=list)
    # What the bundle knows of scene, profile and rewards.
    context: dict[str, str] = field(default_factory=dict)
    conditions: dict[str, int] | None = None  # what preferences ask of its model
    excluded: set[int] = field(default_factory=set)
    fallback: Fallback | None = None
    explorer: Explorer | None = None  # None: the request is not explored

    @property
    def wanted(self) -> int:
        """How many items are searched for: those of the answer, or those that its first is drawn from."""
        return self.trigger.k if self.explorer is None else max(self.trigger.k, self.explorer.candidates)


class Recommender:
    """Answers requests; holds no state of its own.

    `indexes(codebook)` is the newest index of a codebook, None where there is none; `indexes(None)` the one
    that stands in while no bundle names a codebook. `translator(codebook)` turns SIDs of other codebooks,
    under which a history may stand, into those of this one; by default none is known.
    """

    def __init__(
        self,
        indexes: Callable[[str | None], SidIndex | None],
        beam: int,
        repeats: Repeats | None,
        explorer: Explorer,
        clock: Callable[[], float] = perf_counter,
        translator: Callable[[str], TranslateSid] = lambda _: lambda _tag, _sid: None,
        exact: int = 200_000,
        title_of: Callable[[str], str] = lambda _: "",
    ) -> None:
        """`repeats`: which past items may be shown again; None: as each bundle says. `clock()`: seconds, by
        which calls of models are timed. `exact`: in larger catalogues the dense head scores the beam's items
        alone. `title_of(item_id)`: empty where it is not known."""
        self._indexes = indexes
        self._beam = beam
        self._repeats = repeats
        self._explorer = explorer
        self._clock = clock
        self._exact = exact
        self._title_of = title_of
        self._translator = translator

    def recommend(self, requests: Sequence[Request], service: Service | None) -> list[Answer]:
        """One answer a request, in order; all requests of one bundle are one call of its model a level."""
        # One snapshot a codebook for the whole call: leaves of two snapshots are not comparable.
        snapshots: dict[str | None, SidIndex | None] = {}
        cases = []
        for request in requests:
            arm = None if service is None else arm_of(service.rollout, request.trigger.user_id)
            case = self._case(request, service, arm, snapshots)
            case.explorer = self._explorer if self._explorer.chosen(request.trigger.request_id) else None
            cases.append(case)
        return self._answers(cases)

    def shadow(self, requests: Sequence[Request], service: Service, arm: Arm) -> list[Answer]:
        """What the bundle of one arm would have answered, whoever the users are. Nothing is explored."""
        snapshots: dict[str | None, SidIndex | None] = {}
        return self._answers([self._case(request, service, arm, snapshots) for request in requests])

    def _answers(self, cases: Sequence[_Case]) -> list[Answer]:
        answers: dict[int, Answer] = {}
        searches: dict[str, list[tuple[int, _Case]]] = {}
        for at, case in enumerate(cases):
            if case.bundle is None or case.fallback in ("popular", "no_catalog"):
                answers[at] = _popular(case)
            else:
                searches.setdefault(case.bundle.id, []).append((at, case))
        for group in searches.values():
            found = self._search([case for _, case in group])
            answers.update((at, answer) for (at, _), answer in zip(group, found, strict=True))
        return [answers[at] for at in range(len(cases))]

    def _case(
        self,
        request: Request,
        service: Service | None,
        arm: Arm | None,
        snapshots: dict[str | None, SidIndex | None],
    ) -> _Case:
        """What a request starts from in one arm of the service."""
        trigger = request.trigger
        bundle, trial = None, None
        if service is not None and arm is not None:
            bundle, trial = service.bundles[arm.bundle], service.rollout.trial
        codebook = bundle.codebook if bundle else None
        if codebook not in snapshots:
            snapshots[codebook] = self._indexes(codebook)
        index = snapshots[codebook]
        case = _Case(trigger, index, bundle, arm.name if arm else None, trial)
        if index is None:
            case.fallback = "no_catalog"
            return case
        opened = index.leaf_of(trigger.item_id) if trigger.item_id is not None else None
        named = (index.leaf_of(item) for item in (trigger.item_id, *trigger.exclude) if item is not None)
        case.excluded = {leaf for leaf in named if leaf is not None}
        if bundle is None:
            case.fallback = "popular"
            return case
        known = _past(request, bundle, self._translator(bundle.codebook))
        past = [entry.sid for entry in known]
        gone = left_out(
            self._repeats or bundle.ranking,
            [entry.kind == PURCHASE for entry in known],
            [(trigger.ts - entry.ts) // 1000 for entry in known],
        )
        case.excluded |= {
            leaf
            for sid, out in zip(past, gone, strict=True)
            if out and (leaf := index.leaf_of_sid(sid)) is not None
        }
        seen = None if opened is None else tuple(index.sid(opened))
        case.prompt = prompt_sids(past, seen, bundle.max_items)
        if bundle.context.fields:
            case.context = bundle.context.known(told(trigger.scene, _attributes(request)))
        if bundle.rewards is not None and trigger.preferences:
            case.conditions = bundle.rewards.wanted(trigger.preferences) or None
            case.context |= bundle.context.known(said(case.conditions or {}))
        if not past:
            case.fallback = "popular" if seen is None else "trigger_only"
        elif seen is None:
            case.fallback = "history_only"
        return case

    def _dense(self, bundle: LoadedBundle) -> Dense | None:
        if bundle.items is None or bundle.ranking.dense_weight == 0:
            return None
        return Dense(bundle.items, bundle.ranking.dense_weight, self._exact, self._title_of)

    def _search(self, cases: Sequence[_Case]) -> list[Answer]:
        """One bundle's answers; where its model fails, each request alone, then popular items."""
        bundle, index = cases[0].bundle, cases[0].index
        assert bundle is not None, "a case without a bundle is not searched"
        assert index is not None, "a case without an index is not searched"
        begun = self._clock()
        try:
            rankings = search(
                bundle.generator, index,
                [case.prompt for case in cases], [case.excluded for case in cases],
                [case.wanted for case in cases], self._beam, self._dense(bundle),
                [bundle.context.row(case.context) for case in cases] if bundle.context.fields else None,
            )  # fmt: skip
        except Exception:  # whatever a model raises, somebody waits for an answer
            if len(cases) > 1:
                return [answer for case in cases for answer in self._search([case])]
            user = anonymous_user(cases[0].trigger.user_id)
            log.exception("bundle %s failed for user %s: popular items instead", bundle.id, user)
            return [_popular(cases[0], failed_after=self._clock() - begun)]
        took = self._clock() - begun
        return [_ranked(case, index, ranking, took) for case, ranking in zip(cases, rankings, strict=True)]


def _past(request: Request, bundle: LoadedBundle, translate: TranslateSid) -> list[HistoryEntry]:
    """The entries of a history under the bundle's codebook, oldest first; none where it cannot be read.

    An item that has no SID there is left out: the bundle has never heard of it.
    """
    if not request.history:
        return []
    try:
        known = entries_under(request.history, bundle.codebook, translate)
    except (SidstreamError, struct.error, IndexError) as error:
        user = anonymous_user(request.trigger.user_id)
        log.error("the history of user %s is not used: %s", user, error)
        return []
    sizes = bundle.generator.sizes
    return [
        entry
        for entry in known
        if len(entry.sid) == len(sizes)
        and all(code < size for code, size in zip(entry.sid, sizes, strict=True))
    ]


def _attributes(request: Request) -> dict[str, str]:
    """The user's attributes; none where the profile cannot be read."""
    try:
        return profile.unpack_profile(request.profile)
    except SidstreamError as error:
        log.error("the profile of user %s is not used: %s", anonymous_user(request.trigger.user_id), error)
        return {}


def _ranked(case: _Case, index: SidIndex, ranking: Ranking, took: float) -> Answer:
    ranked = [
        RankedItem(item_id=index.item(leaf), sid=index.sid(leaf), score=float(score))
        for leaf, score in zip(ranking.leaves.tolist(), ranking.scores.tolist(), strict=True)
    ]
    exploration = None if case.explorer is None else _explored(case, case.explorer, ranked)
    if exploration is not None:
        ranked.insert(0, ranked.pop(exploration.chosen))
    made = _recommendation(case, ranked[: case.trigger.k], case.fallback, case.conditions)
    return Answer(made, ranking.invalid_mass, model_s=took if ranked else None, exploration=exploration)


def _explored(case: _Case, explorer: Explorer, ranked: Sequence[RankedItem]) -> Exploration | None:
    """A draw from the best of a ranking; None where there is nothing to draw from."""
    # An item that the model rules out (log-probability -inf) is nothing that could be drawn.
    some = itertools.takewhile(lambda one: math.isfinite(one.score), ranked)
    candidates = list(itertools.islice(some, explorer.candidates))
    if not candidates:
        return None
    assert case.bundle is not None, "a ranking has a model"
    assert case.arm is not None, "a model serves an arm"
    assert case.trial is not None, "an arm is of a trial"
    trigger = case.trigger
    scores = [one.score for one in candidates]
    drawn = draw(scores, explorer.temperature, trigger.request_id)
    made = Exploration(
        schema_version=1, event_id=trigger.request_id, ts=trigger.ts,
        request_id=trigger.request_id, user_id=trigger.user_id, item_id=candidates[drawn.chosen].item_id,
        propensity=drawn.propensity, chosen=drawn.chosen, candidates=[one.sid for one in candidates],
        scores=scores, temperature=explorer.temperature, prompt=[list(sid) for sid in case.prompt],
        codebook=case.bundle.codebook, bundle=case.bundle.id, arm=case.arm, trial=case.trial,
        context=case.context,
    )  # fmt: skip
    # A hash of the content, as with preference pairs: what is sent again after a crash is the same event.
    return msgspec.structs.replace(made, event_id=blake2b(encode(made), digest_size=16).hexdigest())


def _popular(case: _Case, failed_after: float | None = None) -> Answer:
    """The bundle's most bought items, then the others by SID; active and not excluded, the k first.

    `failed_after`: seconds after which the model that was asked first failed.
    """
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
    made = _recommendation(case, items, "popular")
    return Answer(made, model_failed=failed_after is not None, model_s=failed_after)


def _recommendation(
    case: _Case, items: list[RankedItem], fallback: Fallback | None,
    conditions: dict[str, int] | None = None,
) -> Recommendation:  # fmt: skip
    trigger = case.trigger
    return Recommendation(
        # Event time, the trigger's: a replayed page is answered in its own year.
        schema_version=1, event_id=uuid.uuid4().hex, ts=trigger.ts,
        request_id=trigger.request_id, user_id=trigger.user_id, items=items,
        bundle=case.bundle.id if case.bundle else None, arm=case.arm, trial=case.trial,
        fallback=fallback if items else "no_catalog", scene=trigger.scene, trigger_item_id=trigger.item_id,
        conditions=conditions if items else None,
    )  # fmt: skip
