"""What was shown and not clicked, as answers that brought `click` 0 (registry.bundles.rewards)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from registry.bundles.context import Context
from registry.bundles.rewards import CLICK, NAMES, Priced, Rewards
from trainer.offline.offpolicy import Explored
from trainer.rewards.labels import labelled, obtained
from trainer.sequences.batches import Int64
from trainer.sequences.interactions import TrainingCatalogue
from trainer.sequences.labelled_answers import LabelledAnswers


def shown(logged: Explored, known: TrainingCatalogue) -> tuple[list[Int64], Int64, Int64]:
    """Histories and drawn items of explorations as rows of a catalogue, and which (N,) explorations they are.

    Items that the catalogue has not are passed over. An exploration that drew one is left out, and so is one
    that drew the page's own item, which is no answer.
    """
    place = {tuple(codes): row for row, codes in enumerate(known.codes.tolist())}
    histories, targets, kept = [], [], []
    for at, prompt in enumerate(logged.prompts):
        past = [place[key] for key in map(tuple, prompt.tolist()) if key in place]
        target = place.get(tuple(logged.codes[logged.drawn[at]].tolist()))
        if target is not None and (not past or past[-1] != target):
            histories.append(np.array(past, dtype=np.int64))
            targets.append(target)
            kept.append(at)
    return histories, np.array(targets, dtype=np.int64), np.array(kept, dtype=np.int64)


def ignored(
    logged: Explored | None, known: TrainingCatalogue, items: Sequence[Priced | None],
    rewards: Rewards | None,
    context: Context, said: int,
) -> LabelledAnswers | None:  # fmt: skip
    """What was explored and not clicked, as `click` 0; None where no field tells of it.

    `items`: of each row of the catalogue; `said`: fields of the context that are not rewards. Explorations
    are drawn by chance: what an answer shows beside them was chosen by the model that would learn from it.
    """
    if logged is None or rewards is None or CLICK not in rewards.mass:
        return None
    histories, targets, at = shown(logged, known)
    quiet = np.flatnonzero(logged.reward[at] == 0)
    values = obtained(rewards, items, targets[quiet], np.zeros(len(quiet), np.int64))
    values[:, NAMES.index(CLICK)] = 0
    return labelled(
        [histories[row] for row in quiet], targets[quiet], logged.contexts[at[quiet], :said], values,
        rewards, context,
    )  # fmt: skip
