"""Ranks items for a trigger, its user and the bundle of the user's arm; every gap has a stated fallback.

What is missing decides the fallback: no history -> `trigger_only`; no trigger item, or an unknown one ->
`history_only`; neither, or no model that answers -> `popular`: the bundle's most bought items, then the rest
of the catalogue in the order of their SIDs. These have no probability: their scores are 0, -1, -2, ...
Without a bundle the order of the SIDs alone decides. Nothing that may be recommended -> `no_catalog`.

An answer is the model's ranking, unchanged, except where the request is explored: there the first item is
drawn from the best (serving.exploration), and the others follow in their order.
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

from registry.bundles.context import context_fields
from registry.bundles.prompt import prompt_sids
from registry.bundles.ranking import RepeatRule
from registry.bundles.rewards import reward_fields
from registry.decoding.beam import DenseHead, RankedLeaves, beam_search
from registry.decoding.list_rules import ListLimits, excluded_leaves
from registry.decoding.sid_index import SidIndex
from registry.releases.rollout import arm_of
from serving.bundle_loader import LoadedBundle, LoadedRollout
from serving.exploration import Explorer, draw_candidate
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
    """A recommendation, and how the model behaved.

    `model_s`: seconds of the model's call, which all requests of a bundle share; None: no model was called,
    or it had no item to rank.
    `exploration`: the draw of the first item; None where it was not drawn.
    """

    recommendation: Recommendation
    invalid_mass: tuple[float, ...] = ()
    model_failed: bool = False
    model_s: float | None = None
    exploration: Exploration | None = None


@dataclass
class _PreparedRequest:
    """One request with all that its answer needs: prompt, context, excluded leaves, arm and fallback."""

    trigger: Trigger
    index: SidIndex | None
    bundle: LoadedBundle | None
    arm: str | None
    trial: str | None
    prompt: list[tuple[int, ...]] = field(default_factory=list)
    # Scene, profile and rewards, as far as the bundle was trained on them.
    context: dict[str, str] = field(default_factory=dict)
    conditions: dict[str, int] | None = None  # the reward bins that the preferences select
    excluded: set[int] = field(default_factory=set)
    fallback: Fallback | None = None
    explorer: Explorer | None = None  # None: the request is not explored

    @property
    def search_size(self) -> int:
        """How many items are searched for: enough for the answer, and for the draw of its first item."""
        return self.trigger.k if self.explorer is None else max(self.trigger.k, self.explorer.candidates)


class Recommender:
    """Answers requests; holds no state of its own.

    `indexes(codebook)` is the newest index of a codebook, None where there is none; `indexes(None)` is used
    while no bundle names a codebook. `translator(codebook)` translates SIDs of other codebooks, which a
    history may hold, into SIDs of this one; by default it translates none.
    """

    def __init__(
        self,
        indexes: Callable[[str | None], SidIndex | None],
        limits: ListLimits,
        explorer: Explorer,
        clock: Callable[[], float] = perf_counter,
        translator: Callable[[str], TranslateSid] = lambda _: lambda _tag, _sid: None,
        title_of: Callable[[str], str] = lambda _: "",
    ) -> None:
        """`clock()`: seconds, for the times of the models' calls. `title_of(item_id)`: empty where it is not
        known.
        """
        self._indexes = indexes
        self._limits = limits
        self._explorer = explorer
        self._clock = clock
        self._title_of = title_of
        self._translator = translator

    def recommend(self, requests: Sequence[Request], loaded_rollout: LoadedRollout | None) -> list[Answer]:
        """One answer a request, in order; all requests of one bundle are one call of its model a level."""
        # One snapshot a codebook for the whole call: leaves of two snapshots are not comparable.
        snapshots: dict[str | None, SidIndex | None] = {}
        prepared_requests = []
        for request in requests:
            arm = None if loaded_rollout is None else arm_of(loaded_rollout.rollout, request.trigger.user_id)
            prepared = self._prepare(request, loaded_rollout, arm, snapshots)
            prepared.explorer = (
                self._explorer if self._explorer.explores(request.trigger.request_id) else None
            )
            prepared_requests.append(prepared)
        return self._answer_all(prepared_requests)

    def shadow(self, requests: Sequence[Request], loaded_rollout: LoadedRollout, arm: Arm) -> list[Answer]:
        """What the bundle of one arm would have answered to all of the requests. Nothing is explored."""
        snapshots: dict[str | None, SidIndex | None] = {}
        return self._answer_all(
            [self._prepare(request, loaded_rollout, arm, snapshots) for request in requests]
        )

    def _answer_all(self, prepared_requests: Sequence[_PreparedRequest]) -> list[Answer]:
        answers: dict[int, Answer] = {}
        searches: dict[str, list[tuple[int, _PreparedRequest]]] = {}
        for position, prepared in enumerate(prepared_requests):
            if prepared.bundle is None or prepared.fallback in ("popular", "no_catalog"):
                answers[position] = _popular_answer(prepared)
            else:
                searches.setdefault(prepared.bundle.id, []).append((position, prepared))
        for group in searches.values():
            group_answers = self._rank_with_model([prepared for _, prepared in group])
            answers.update(
                (position, answer) for (position, _), answer in zip(group, group_answers, strict=True)
            )
        return [answers[position] for position in range(len(prepared_requests))]

    def _prepare(
        self,
        request: Request,
        loaded_rollout: LoadedRollout | None,
        arm: Arm | None,
        snapshots: dict[str | None, SidIndex | None],
    ) -> _PreparedRequest:
        """A request with its prompt, context, exclusions and fallback in one arm of the rollout."""
        trigger = request.trigger
        bundle, trial = None, None
        if loaded_rollout is not None and arm is not None:
            bundle, trial = loaded_rollout.bundles[arm.bundle], loaded_rollout.rollout.trial
        codebook = bundle.codebook if bundle else None
        if codebook not in snapshots:
            snapshots[codebook] = self._indexes(codebook)
        index = snapshots[codebook]
        prepared = _PreparedRequest(trigger, index, bundle, arm.name if arm else None, trial)
        if index is None:
            prepared.fallback = "no_catalog"
            return prepared
        trigger_leaf = index.leaf_of(trigger.item_id) if trigger.item_id is not None else None
        named = (trigger.item_id, *trigger.exclude)
        if bundle is None:
            prepared.excluded = excluded_leaves(index, named, RepeatRule(), (), (), ())
            prepared.fallback = "popular"
            return prepared
        entries = _history_entries(request, bundle, self._translator(bundle.codebook))
        history_sids = [entry.sid for entry in entries]
        prepared.excluded = excluded_leaves(
            index, named, self._limits.repeats or bundle.ranking, history_sids,
            [entry.kind == PURCHASE for entry in entries],
            [(trigger.ts - entry.ts) // 1000 for entry in entries],
        )  # fmt: skip
        trigger_sid = None if trigger_leaf is None else tuple(index.sid(trigger_leaf))
        prepared.prompt = prompt_sids(history_sids, trigger_sid, bundle.max_items)
        if bundle.context.fields:
            prepared.context = bundle.context.known_fields(
                context_fields(trigger.scene, _attributes(request))
            )
        if bundle.rewards is not None and trigger.preferences:
            prepared.conditions = bundle.rewards.requested_rewards(trigger.preferences) or None
            prepared.context |= bundle.context.known_fields(reward_fields(prepared.conditions or {}))
        if not history_sids:
            prepared.fallback = "popular" if trigger_sid is None else "trigger_only"
        elif trigger_sid is None:
            prepared.fallback = "history_only"
        return prepared

    def _dense(self, bundle: LoadedBundle) -> DenseHead | None:
        if bundle.items is None:
            return None
        return DenseHead(bundle.items, self._limits.exact_items, self._title_of)

    def _rank_with_model(self, prepared_requests: Sequence[_PreparedRequest]) -> list[Answer]:
        """One bundle's answers; where its model fails, each request alone, then popular items."""
        bundle, index = prepared_requests[0].bundle, prepared_requests[0].index
        assert bundle is not None, "a case without a bundle is not searched"
        assert index is not None, "a case without an index is not searched"
        begun = self._clock()
        try:
            contexts = [bundle.context.row(prepared.context) for prepared in prepared_requests]
            rankings = beam_search(
                bundle.generator, index,
                [prepared.prompt for prepared in prepared_requests],
                [prepared.excluded for prepared in prepared_requests],
                [prepared.search_size for prepared in prepared_requests],
                self._limits.beam, self._dense(bundle), bundle.ranking.dense_weight,
                contexts if bundle.context.fields else None,
            )  # fmt: skip
        except Exception:  # a caller waits for an answer, whatever the model raises
            if len(prepared_requests) > 1:
                return [
                    answer for prepared in prepared_requests for answer in self._rank_with_model([prepared])
                ]
            user = anonymous_user(prepared_requests[0].trigger.user_id)
            log.exception("bundle %s failed for user %s: popular items instead", bundle.id, user)
            return [_popular_answer(prepared_requests[0], failed_after=self._clock() - begun)]
        seconds = self._clock() - begun
        return [
            _ranked_answer(prepared, index, ranking, seconds)
            for prepared, ranking in zip(prepared_requests, rankings, strict=True)
        ]


def _history_entries(request: Request, bundle: LoadedBundle, translate: TranslateSid) -> list[HistoryEntry]:
    """The entries of a history under the bundle's codebook, oldest first; none where it cannot be read.

    An item without an SID under it is left out: the bundle was not trained on it.
    """
    if not request.history:
        return []
    try:
        entries = entries_under(request.history, bundle.codebook, translate)
    except (SidstreamError, struct.error, IndexError) as error:
        user = anonymous_user(request.trigger.user_id)
        log.error("the history of user %s is not used: %s", user, error)
        return []
    sizes = bundle.generator.sizes
    return [
        entry
        for entry in entries
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


def _ranked_answer(
    prepared: _PreparedRequest, index: SidIndex, ranking: RankedLeaves, seconds: float
) -> Answer:
    ranked = [
        RankedItem(item_id=index.item(leaf), sid=index.sid(leaf), score=float(score))
        for leaf, score in zip(ranking.leaves.tolist(), ranking.scores.tolist(), strict=True)
    ]
    exploration = None if prepared.explorer is None else _draw_first_item(prepared, prepared.explorer, ranked)
    if exploration is not None:
        ranked.insert(0, ranked.pop(exploration.chosen))
    recommendation = _recommendation(
        prepared,
        ranked[: prepared.trigger.k],
        prepared.fallback,
        prepared.conditions,
    )
    return Answer(
        recommendation, ranking.invalid_mass, model_s=seconds if ranked else None, exploration=exploration
    )


def _draw_first_item(
    prepared: _PreparedRequest, explorer: Explorer, ranked: Sequence[RankedItem]
) -> Exploration | None:
    """A draw from the best of a ranking; None where there is nothing to draw from."""
    # An item that the model rules out (log-probability -inf) cannot be drawn.
    possible_items = itertools.takewhile(lambda item: math.isfinite(item.score), ranked)
    candidates = list(itertools.islice(possible_items, explorer.candidates))
    if not candidates:
        return None
    assert prepared.bundle is not None, "a ranking has a model"
    assert prepared.arm is not None, "a model serves an arm"
    assert prepared.trial is not None, "an arm is of a trial"
    trigger = prepared.trigger
    scores = [item.score for item in candidates]
    drawn = draw_candidate(scores, explorer.temperature, trigger.request_id)
    exploration = Exploration(
        schema_version=1, event_id=trigger.request_id, ts=trigger.ts,
        request_id=trigger.request_id, user_id=trigger.user_id, item_id=candidates[drawn.position].item_id,
        propensity=drawn.propensity, chosen=drawn.position, candidates=[item.sid for item in candidates],
        scores=scores, temperature=explorer.temperature, prompt=[list(sid) for sid in prepared.prompt],
        codebook=prepared.bundle.codebook, bundle=prepared.bundle.id, arm=prepared.arm, trial=prepared.trial,
        context=prepared.context,
    )  # fmt: skip
    # A hash of the content, as with preference pairs: what is sent again after a crash is the same event.
    return msgspec.structs.replace(
        exploration, event_id=blake2b(encode(exploration), digest_size=16).hexdigest()
    )


def _popular_answer(prepared: _PreparedRequest, failed_after: float | None = None) -> Answer:
    """The bundle's most bought items, then the others by SID; active and not excluded, the k first.

    `failed_after`: seconds after which the model failed; None: no model was called.
    """
    index = prepared.index
    leaves: dict[int, None] = {}  # in order, each once
    if index is not None:
        bought = (index.leaf_of(item) for item in (prepared.bundle.popular if prepared.bundle else ()))
        for leaf in itertools.chain(bought, map(int, np.flatnonzero(index.active))):
            if len(leaves) == prepared.trigger.k:
                break
            if leaf is not None and index.active[leaf] and leaf not in prepared.excluded:
                leaves[leaf] = None
    items = [
        RankedItem(item_id=index.item(leaf), sid=index.sid(leaf), score=float(-rank))
        for rank, leaf in enumerate(leaves)
        if index is not None
    ]
    recommendation = _recommendation(prepared, items, "popular")
    return Answer(recommendation, model_failed=failed_after is not None, model_s=failed_after)


def _recommendation(
    prepared: _PreparedRequest, items: list[RankedItem], fallback: Fallback | None,
    conditions: dict[str, int] | None = None,
) -> Recommendation:  # fmt: skip
    trigger = prepared.trigger
    return Recommendation(
        # Event time, the trigger's: a replayed page is answered in its own year.
        schema_version=1, event_id=uuid.uuid4().hex, ts=trigger.ts,
        request_id=trigger.request_id, user_id=trigger.user_id, items=items,
        bundle=prepared.bundle.id if prepared.bundle else None, arm=prepared.arm, trial=prepared.trial,
        fallback=fallback if items else "no_catalog", scene=trigger.scene, trigger_item_id=trigger.item_id,
        conditions=conditions if items else None,
    )  # fmt: skip
