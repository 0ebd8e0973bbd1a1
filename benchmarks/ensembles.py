"""Generators of several tokenisations together, and one that learns from them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from trainer.evaluation.generator_ranker import TrainedGenerator, TrainingRecipe
from trainer.evaluation.ranker import Mask, Progress
from trainer.evaluation.sequences import Int64
from trainer.evaluation.splits import EvaluationSplit
from trainer.offline_checks.ranking import item_logits, sid_scores
from trainer.sequences.batches import SequenceBatch, pad_items
from trainer.tuning.losses import ItemBias
from trainer.tuning.next_item import ScoredItems, learned_positions, states_before_targets
from trainer.tuning.soft_targets import SoftTargets

_CHUNK = 256
# Items that a teacher names at a position, and the share of a target's weight that they get.
_TEACHER_ITEMS, _TEACHER_SHARE = 20, 0.5


class Ensemble:
    """Mean log-probabilities of members that have an order of items in common, and nothing else."""

    def __init__(self, members: Sequence[TrainedGenerator]) -> None:
        self.members = members

    @torch.no_grad()
    def _states_and_scores(
        self, member: TrainedGenerator, histories: Sequence[Int64]
    ) -> tuple[Tensor, Tensor]:
        """A member's states (B, D), and its dense log-probabilities (B, I) in the order of the catalogue."""
        model = member.model
        items, lengths = pad_items(
            [row[-member.settings.max_items :] for row in histories], member.catalogue.codes
        )
        state = model.encode(items, lengths)
        catalogue_rows = model.model.items.rows(torch.from_numpy(member.catalogue.codes))
        logits, _, _ = item_logits(model, state, items, lengths)
        return state, logits.log_softmax(-1)[:, catalogue_rows]

    @torch.no_grad()
    def rank(self, histories: Sequence[Int64], k: int, mask: Mask, head: str) -> Int64:
        """(B, k) items of the catalogue, best first: "dense" of all items, "beam" of all members' beams."""
        student_generator = []
        for low in range(0, len(histories), _CHUNK):
            chunk = histories[low : low + _CHUNK]
            member_scores = [self._states_and_scores(member, chunk) for member in self.members]
            if head == "dense":
                scores = torch.stack([logs for _, logs in member_scores]).mean(0)
            else:
                # Of equal chances, as every member can spell every item: the sum over SIDs, where one had it.
                beams = [member.ranker.candidates([row[-50:] for row in chunk]) for member in self.members]
                width = self.members[0].recipe.candidates
                items = torch.cat([beam.items[:, :width] for beam in beams], dim=1)
                history_of_item = torch.arange(len(items)).repeat_interleave(items.shape[1])
                flat = items.clamp(min=0).flatten()
                codes = [torch.from_numpy(member.catalogue.codes)[flat] for member in self.members]
                spelled = torch.stack([
                    sid_scores(member.model, state, history_of_item, member_codes)
                    for member, (state, _), member_codes in zip(
                        self.members, member_scores, codes, strict=True
                    )
                ]).mean(0).view(items.shape)  # fmt: skip
                scores = torch.full_like(member_scores[0][1], -torch.inf)
                scores.scatter_(1, items.clamp(min=0), spelled.masked_fill(items < 0, -torch.inf))
            if mask == "seen":
                for row, history in enumerate(chunk):
                    scores[row, torch.from_numpy(np.unique(history))] = -torch.inf
            best = scores.topk(k, dim=1)
            student_generator.append(torch.where(best.values > -torch.inf, best.indices, -1).numpy())
        return np.concatenate(student_generator)


def distil(
    ensemble: Ensemble, recipe: TrainingRecipe, split: EvaluationSplit, seed: int, progress: Progress
) -> TrainedGenerator:
    """A model that learns half from what happened and half from what the ensemble finds likely."""
    student_generator = TrainedGenerator(recipe)
    student_rows: dict[str, Tensor] = {}

    @torch.no_grad()
    def teacher(pieces: SequenceBatch, among: ScoredItems | None) -> SoftTargets:
        log_probabilities = torch.zeros(int(pieces.learned.sum()), split.dataset.size)
        for member in ensemble.members:
            model = member.model.eval()
            catalogue_rows = model.model.items.rows(torch.from_numpy(member.catalogue.codes))
            positions = learned_positions(pieces, catalogue_rows)
            item_vectors, state = states_before_targets(model, positions)
            queries = model.model.queries(state)
            bias = ItemBias(positions.past_items, model.model.items.repeat_bias(queries, positions.past))
            logits = bias.added_to(queries @ item_vectors.T)
            log_probabilities += logits.log_softmax(-1)[:, catalogue_rows]
        if "rows" not in student_rows:
            student_rows["rows"] = student_generator.model.model.items.rows(
                torch.from_numpy(student_generator.catalogue.codes)
            )
        log_probabilities /= len(ensemble.members)
        if among is not None:
            # The student's softmax has no place for what nobody touched.
            log_probabilities[:, ~among.is_scored[student_rows["rows"]]] = -torch.inf
        best = log_probabilities.topk(min(_TEACHER_ITEMS, split.dataset.size), dim=1)
        items = student_rows["rows"][best.indices]
        return SoftTargets(
            items if among is None else among.position[items], best.values.softmax(-1), _TEACHER_SHARE
        )

    student_generator.fit(split, seed, progress, teacher)
    return student_generator
