"""Preference pairs of a log for `benchmarks.alignment`: by the agents' rule, and over what would be shown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from agents.attribution.pairs import OpenPairWindows, PairRules
from agents.attribution.window_stage import WindowRules
from streams.events import Click, PreferencePair, Purchase, Scheme
from trainer.evaluation.generator_ranker import TrainedGenerator
from trainer.evaluation.sequences import PURCHASE_WINDOW_MS
from trainer.evaluation.splits import EvaluationSplit

# The attribution window of pairs: ten minutes of a log that has three hours.
WINDOWS_MS = {"tmall2014": PURCHASE_WINDOW_MS, "rees46": 600_000}
_SHOWN = 10


def clicked_pairs(split: EvaluationSplit, trained: TrainedGenerator) -> Iterator[PreferencePair]:
    """`purchased_over_clicked`, as the agents decide it when the training part ends."""
    dataset = split.dataset
    assert dataset.ts is not None, "the log has times"
    assert dataset.bought_ts is not None, "the log has purchases"
    assert split.part_starts is not None, "the split is one in time"
    end = split.part_starts[0]
    windows = WindowRules(WINDOWS_MS[dataset.name], 0)
    for user, (row, ts, purchase_times) in enumerate(
        zip(dataset.items, dataset.ts, dataset.bought_ts, strict=True)
    ):
        state, name = OpenPairWindows(), str(user)
        events: list[Click | Purchase] = []
        for item, at, when in zip(row.tolist(), ts.tolist(), purchase_times.tolist(), strict=True):
            shared: dict[str, Any] = {"schema_version": 1, "user_id": name, "item_id": str(item)}
            if at < end:
                events.append(Click(event_id=f"c{at}-{item}", ts=at, **shared))
            if 0 <= when < end:
                events.append(Purchase(event_id=f"p{when}-{item}", ts=when, price=0.0, **shared))
        for event in sorted(events, key=lambda event: event.ts):
            state.add_event(event, windows, None)
        for decision in state.close_due(end, PairRules(windows, 10, lambda _: True)):
            past = row[ts < decision.before]
            yield _pair(
                trained, user, decision.scheme, decision.ts, past, int(decision.chosen),
                [int(item) for item in decision.rejected],
            )  # fmt: skip


def shown_pairs(
    split: EvaluationSplit, trained: TrainedGenerator, scheme: Scheme, seed: int, max_pairs: int
) -> Iterator[PreferencePair]:
    """Chosen steps of the training part over what the fine-tuned model would have shown before them.

    Of steps whose item it would have shown: the agents make a pair of what was taken from a slate, and a log
    says what would be taken from another one only where they agree (replay: Li et al. 2011, arXiv 1003.5956).
    Up to `most` pairs, of steps drawn by `seed`.
    """
    dataset = split.dataset
    assert dataset.ts is not None, "the log has times"
    assert dataset.bought is not None, "the log has purchases"
    assert split.part_starts is not None, "the split is one in time"
    steps = []
    for user, (ts, bought) in enumerate(zip(dataset.ts, dataset.bought, strict=True)):
        # Only what is known by then: the window of the last steps is still open.
        decided_steps = int(np.searchsorted(ts, split.part_starts[0] - WINDOWS_MS[dataset.name]))
        chosen_steps = (
            range(1, decided_steps)
            if scheme == "clicked_over_shown"
            else np.flatnonzero(bought[:decided_steps])
        )
        steps += [(user, int(at)) for at in chosen_steps if at]
    order = np.random.default_rng(seed).permutation(len(steps)).tolist()
    pair_count = 0
    for begin in range(0, len(order), max_pairs):
        batch = [steps[at] for at in order[begin : begin + max_pairs]]
        slates = trained.rank([dataset.items[user][:at] for user, at in batch], _SHOWN, "none", "mixed")
        for (user, at), items in zip(batch, slates.tolist(), strict=True):
            row, ts = dataset.items[user], dataset.ts[user]
            within_window = np.abs(ts - ts[at]) <= WINDOWS_MS[dataset.name]
            touched_items = set(row[within_window].tolist())
            rejected = [item for item in items if item >= 0 and item not in touched_items]
            if rejected and int(row[at]) in items:
                yield _pair(trained, user, scheme, int(ts[at]), row[:at], int(row[at]), rejected)
                pair_count += 1
                if pair_count == max_pairs:
                    return


def _pair(
    trained: TrainedGenerator,
    user: int,
    scheme: Scheme,
    ts: int,
    past: np.ndarray,
    chosen: int,
    rejected: list[int],
) -> PreferencePair:
    def sid(item: int) -> list[int]:
        return list(map(int, trained.catalogue.sids[item]))

    return PreferencePair(
        schema_version=1, event_id=f"{scheme}-{user}-{ts}-{chosen}-{len(past)}", ts=ts, user_id=str(user),
        scheme=scheme, codebook="evaluation", chosen_item=str(chosen), chosen=sid(chosen),
        rejected_items=[str(item) for item in rejected], rejected=[sid(item) for item in rejected],
        history=[sid(item) for item in past.tolist()[-trained.settings.max_items :]],
    )  # fmt: skip
