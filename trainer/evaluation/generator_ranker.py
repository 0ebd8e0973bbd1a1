"""The product's generator as a ranker of the evaluation, trained by the update cycle's own code."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from registry.bundles.context import count_values, vocabulary
from registry.bundles.embedder import title_vectors
from registry.bundles.prompt import Prompt
from registry.bundles.ranking import Ranking
from registry.bundles.rewards import with_reward_fields
from registry.hold_out import HoldOut
from registry.settings import CodebookSettings
from trainer.codebooks.collaborative import collaborative_vectors, fuse_vectors
from trainer.codebooks.fit import assign_keeping, fit_codebook_to_vectors
from trainer.evaluation.ranker import Head, Mask, Progress
from trainer.evaluation.sequences import flatten
from trainer.evaluation.splits import EvaluationSplit, TimeShard
from trainer.generator.build import fresh_generator
from trainer.generator.constrained import SidSet
from trainer.generator.model import GeneratorForCausalLM
from trainer.offline_checks.ranking import Candidates, CatalogueRanker, in_histories
from trainer.rewards.labels import learn_rewards, purchase_labels, with_reward_labels
from trainer.sequences.batches import Int32, Int64
from trainer.sequences.held_out import HeldOut, TrainingSplit, split_log
from trainer.sequences.interactions import Interactions, training_catalogue
from trainer.sequences.rows import TrainingRows
from trainer.sequences.tokenizer import build_tokenizer
from trainer.settings import TrainerSettings
from trainer.tuning.ensemble import train_ensemble
from trainer.tuning.next_item import TeacherTargets
from trainer.tuning.sft import SftResult, train

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class TrainingRecipe:
    """What is trained, apart from the seed."""

    trainer: dict[str, Any] = field(default_factory=dict)
    codebook: dict[str, Any] = field(default_factory=dict)
    candidates: int = 50  # of each head

    def with_trainer_settings(self, trainer: dict[str, Any]) -> TrainingRecipe:
        """The same recipe with other settings of the trainer."""
        return replace(self, trainer=self.trainer | trainer)


def tuned_recipe(
    max_seconds: float | None = None, epochs: int | None = None, members: int = 1
) -> TrainingRecipe:
    """What `sidstream evaluate` trains: tuned on the validation part of Amazon Beauty, used for all sets."""
    return TrainingRecipe(
        trainer={
            "members": members,
            "width": 128, "layers": 2, "heads": 2, "ffn_factor": 4, "depth_factor": 2, "dropout": 0.5,
            "lr": 1e-3, "weight_decay": 0.0, "epochs": 20 if epochs is None else epochs, "patience": 5,
            "max_seconds": max_seconds, "validation_users": 3000, "max_words": 0,
            "weights": {"sid_to_title": 0.0, "title_to_sid": 0.0}, "rewards": {"enabled": False},
        },
        codebook={"levels": 4, "size": 256, "collaborative": 0.5},
    )  # fmt: skip


def default_recipe(
    max_seconds: float | None = None, epochs: int | None = None, context: bool = True
) -> TrainingRecipe:
    """What `sidstream train` trains by default, also in the demo; without user attributes if not `context`.

    The default budget in seconds holds only where neither `epochs` nor `max_seconds` is given.
    """
    trainer: dict[str, Any] = {} if context else {"context": {"max_fields": 0}}
    if epochs is not None:
        trainer |= {"epochs": epochs, "max_seconds": None}
    if max_seconds is not None:
        trainer["max_seconds"] = max_seconds
    return TrainingRecipe(trainer=trainer)


class TrainedGenerator:
    """One trained generator, which several heads rank with."""

    def __init__(self, recipe: TrainingRecipe, first_member: TrainedGenerator | None = None) -> None:
        """`first_member`: a generator of the same recipe except `members`; the ensemble's first one."""
        self.recipe, self._first_member = recipe, first_member
        self.result: SftResult
        self.trained_s = 0.0
        self._seed: int | None = None
        self._split: EvaluationSplit | None = None
        self._candidates: dict[int, Candidates] = {}

    def fit(
        self, split: EvaluationSplit, seed: int, progress: Progress, teacher: TeacherTargets | None = None
    ) -> None:
        """Codebook, SIDs and generator of a split; once for all heads of one seed. `teacher`: see `train`."""
        if self._seed == seed and self._split is split:
            self._rank_after(0)
            return
        if self._first_member:
            self._first_member.fit(split, seed, progress)
        started = time.monotonic()
        self.settings = TrainerSettings.model_validate(
            {"beat_popularity": False, **self.recipe.trainer, "seed": seed}
        )
        text_vectors = _text_vectors(split, progress)
        self._fit_catalogue(split, text_vectors, progress)
        self._fit_context(split)
        self.rows = self._training_rows(split)
        self._train_generator(text_vectors, progress, teacher)
        self._seed, self._split = seed, split
        self._train_lengths = [len(items) for items in split.train]
        self.trained_s = time.monotonic() - started
        if self._first_member:
            self.trained_s += self._first_member.trained_s

    def _fit_catalogue(
        self, split: EvaluationSplit, text_vectors: Float32 | None, progress: Progress
    ) -> None:
        """The codebook, the items with their SIDs, and the tokenizer."""
        settings = CodebookSettings.model_validate(self.recipe.codebook)
        # Without texts, SIDs can be made only from what users did.
        collaborative_dim = (
            settings.collaborative_dim if settings.collaborative or text_vectors is None else 0
        )
        if collaborative_dim:
            vectors = collaborative_vectors(split.train, split.dataset.size, collaborative_dim)
        if text_vectors is not None:
            vectors = (
                fuse_vectors(text_vectors, vectors, settings.collaborative)
                if collaborative_dim
                else text_vectors
            )
        progress("codebook")
        # Without texts every dimension is collaborative, so there is no other part to weigh it against.
        weighed_dim = 0 if text_vectors is None else collaborative_dim
        codebook = fit_codebook_to_vectors(vectors, "evaluation", settings, weighed_dim)
        sids = assign_keeping(codebook, vectors, [None] * len(vectors))
        self.sids = np.array(sids, dtype=np.int64)
        prompt = Prompt(codebook.sizes, self.settings.max_items)
        # Item rows are the order of the catalogue here: names sort as numbers do.
        names = [f"{row:09d}" for row in range(split.dataset.size)]
        self.catalogue = training_catalogue(
            dict(zip(names, sids, strict=True)), dict(zip(names, split.dataset.texts, strict=True)), prompt,
            newest_is_page=False,
        )  # fmt: skip
        self.sid_set = SidSet(sids, prompt)
        self.tokenizer = build_tokenizer(prompt, self.catalogue.titles, self.settings.max_words)

    def _fit_context(self, split: EvaluationSplit) -> None:
        """The vocabulary of user attributes, and the profile of each user as token ids."""
        users = split.dataset.users
        attributes = split.dataset.profiles or [{} for _ in users]
        # As in the update cycle, only users of the training part count: nothing is learned of the others.
        trained = [values for values, items in zip(attributes, split.train, strict=True) if len(items)]
        limits = self.settings.context
        self.context = vocabulary(
            count_values({}, trained),
            len(self.tokenizer),
            limits.min_count,
            limits.max_values,
            limits.max_fields,
        )
        # (U, C) token ids of each user's profile.
        self.profiles = self.context.rows(
            [None] * len(users), users, dict(zip(users, attributes, strict=True))
        )

    def _training_rows(self, split: EvaluationSplit) -> TrainingRows:
        """What the generator learns from, with reward labels where the items have prices."""
        log = training_log(split, self.profiles)
        self.held_out = _held_out(split, self.settings, self.profiles)
        # These logs say only that an item was bought: the length of a purchase window does not matter.
        offers, bought = split.dataset.offers or [], purchase_labels(log, 0)
        self.rewards = learn_rewards(offers, log, bought, 0, self.settings.rewards) if offers else None
        self.context = with_reward_fields(self.context, self.rewards)
        log = with_reward_labels(log, offers, bought, self.rewards, self.context)
        parts = TrainingSplit(log, self.held_out)
        return TrainingRows(parts, self.catalogue, self.tokenizer, self.sid_set.prompt, self.settings)

    def _train_generator(
        self, text_vectors: Float32 | None, progress: Progress, teacher: TeacherTargets | None
    ) -> None:
        input_vectors = text_vectors if self.settings.text_inputs else None

        def new_member(
            settings: TrainerSettings, rows: TrainingRows, folder: Path | None
        ) -> GeneratorForCausalLM:
            # The teacher of a distillation reads `model` while a member is in training.
            self.model = fresh_generator(
                self.catalogue, input_vectors, self.sid_set.prompt, len(self.tokenizer), settings,
                self.context.size,
            )  # fmt: skip
            return self.model

        first_member = self._first_member
        self.model, self.result = train_ensemble(
            new_member, self.rows, self.sid_set, self.settings, progress=progress, teacher=teacher,
            first_member=(first_member.model, first_member.result) if first_member else None,
        )  # fmt: skip
        quality = self.result.quality
        self.ranking = quality.ranking if quality else Ranking(dense_weight=0.5)
        self.invalid_rate = 1.0 - quality.validity if quality else None
        # The model after so many shards; the first is the one that `fit` trained.
        self._models_after, self._shards_learned = [self.model], 0
        self.rank_with(self.model)

    def update(self, shard: TimeShard) -> None:
        """Go on learning, as a refresh of the update cycle does.

        Several heads are taken through the same shards one after the other: each shard is learned once.
        """
        if self._shards_learned + 1 == len(self._models_after):
            self._models_after.append(self._refreshed(shard))
        self._rank_after(self._shards_learned + 1)

    def _rank_after(self, shards: int) -> None:
        """Rank with the model that has learned so many shards."""
        if self._shards_learned != shards:
            self._shards_learned = shards
            self.rank_with(self._models_after[shards])

    def _refreshed(self, shard: TimeShard) -> GeneratorForCausalLM:
        """A copy of the model that has also learned a shard."""
        split = self._split
        assert split is not None, "fit comes first"
        before = list(self._train_lengths)
        for user, history, new_items in zip(
            shard.users.tolist(), shard.histories, shard.new_items, strict=True
        ):
            self._train_lengths[user] = len(history) + len(new_items)
        log = training_log(split.with_train_lengths(self._train_lengths), self.profiles)
        lengths = zip(self._train_lengths, before, strict=True)
        log = replace(log, fresh=np.concatenate([np.arange(now) >= then for now, then in lengths]))
        log = with_reward_labels(
            log, split.dataset.offers or [], purchase_labels(log, 0), self.rewards, self.context
        )
        settings = self.settings.model_copy(
            update={"lr": self.settings.refresh_lr, "seed": self.settings.seed + len(self._models_after)}
        )
        # What `fit` learned of these users judges nothing: only their events of the shard do.
        hold_out = HoldOut(share=settings.validation_share)
        parts = split_log(log, hold_out, settings).new_targets_only()
        rows = TrainingRows(parts, self.catalogue, self.tokenizer, self.sid_set.prompt, settings)
        model = copy.deepcopy(self.model)
        train(model, rows, self.sid_set, settings)
        return model

    def rank_with(self, model: GeneratorForCausalLM) -> None:
        """Rank with another model of the same codebook, catalogue and weight of the heads."""
        self.model, self._candidates = model, {}
        self.ranker = CatalogueRanker(model, self.catalogue.codes, self.sid_set, self.recipe.candidates)

    def rank(
        self, histories: Sequence[Int64], k: int, mask: Mask, head: Head, users: Int64 | None = None
    ) -> Int64:
        """(B, k) item rows, best first, -1 where candidates end. `users` (B,); None: no profiles."""
        weight = {"beam": 0.0, "reordered": 1.0, "dense": 1.0, "mixed": self.ranking.dense_weight}[head]
        return self.rank_mixed(histories, k, mask, weight, head in ("beam", "reordered"), users)

    def rank_mixed(
        self, histories: Sequence[Int64], k: int, mask: Mask, dense_weight: float, beam_only: bool = False,
        users: Int64 | None = None,
    ) -> Int64:  # fmt: skip
        """As `rank`, with another weight of the dense head."""
        contexts = None if users is None else self.profiles[users]
        context_ids = () if contexts is None else tuple(contexts.ravel().tolist())
        key = hash((context_ids, *((len(row), int(row[-1]) if len(row) else -1) for row in histories)))
        candidates = self._candidates.get(key)
        if candidates is None:
            newest = [row[-self.settings.max_items :] for row in histories]
            states = self.ranker.states(newest, contexts)
            if dense_weight == 1 and mask == "none" and not beam_only:
                return self.ranker.best_items(newest, states, k).numpy()
            candidates = self.ranker.candidates(newest, states)
            # Only the largest set of histories is kept: every head and mask ranks the same ones.
            if all(len(histories) >= len(cached.items) for cached in self._candidates.values()):
                self._candidates = {key: candidates}
        allowed = torch.ones(candidates.items.shape, dtype=torch.bool)
        if beam_only:
            allowed[:, self.recipe.candidates :] = False
        if mask == "seen":
            allowed &= ~torch.from_numpy(in_histories(candidates.items, histories))
        order = candidates.order(dense_weight, allowed)[:, :k].numpy()
        lists = np.full((len(histories), k), -1, dtype=np.int64)
        lists[:, : order.shape[1]] = order
        return lists


class GeneratorRanker:
    """One head of a trained generator, as a `Ranker` of the evaluation."""

    head: str

    def __init__(self, name: str, trained: TrainedGenerator, head: Head) -> None:
        self.name, self.head = name, head
        self._trained, self._head = trained, head

    def fit(self, split: EvaluationSplit, seed: int, progress: Progress) -> None:
        """Train, or take what another head trained."""
        self._trained.fit(split, seed, progress)
        model: GeneratorForCausalLM = self._trained.model
        self.parameters = sum(value.numel() for value in model.parameters())
        self.sids, self.trained_s = self._trained.sids, self._trained.trained_s
        self.invalid_rate = self._trained.invalid_rate

    def update(self, shard: TimeShard) -> None:
        """Learn a shard, or take what another head learned of it."""
        self._trained.update(shard)

    def rank(self, histories: Sequence[Int64], k: int, mask: Mask) -> Int64:
        """(B, k) item rows, best first."""
        return self._trained.rank(histories, k, mask, self._head)

    def rank_for(self, users: Int64, histories: Sequence[Int64], k: int, mask: Mask) -> Int64:
        """(B, k) item rows, best first, by the profiles of the users (B,) as well."""
        return self._trained.rank(histories, k, mask, self._head, users)


def _text_vectors(split: EvaluationSplit, progress: Progress) -> Float32 | None:
    if not any(split.dataset.texts):
        return None
    progress("text vectors")
    return title_vectors(split.dataset.texts)


def training_log(split: EvaluationSplit, profiles: Int32) -> Interactions:
    """The training histories as the trainer's log. Times are 0 where the data set has none."""
    items, starts = flatten(split.train)
    count = len(items)
    ts = np.zeros(count, dtype=np.int64)
    if split.dataset.ts is not None:
        ts, _ = flatten([times[: len(row)] for times, row in zip(split.dataset.ts, split.train, strict=True)])
    bought = np.zeros(count, dtype=bool)
    if split.bought is not None:
        bought = np.concatenate([*split.bought, bought[:0]])
    return Interactions(
        [str(user) for user in range(len(split.train))], starts, items, ts,
        np.ones(count, dtype=bool), bought, np.repeat(profiles, np.diff(starts), axis=0),
        np.zeros((count, 0), dtype=np.int32),
    )  # fmt: skip


def _held_out(split: EvaluationSplit, settings: TrainerSettings, profiles: Int32) -> HeldOut:
    """The first validation target of each user, for up to `validation_users` users."""
    first: dict[int, tuple[Int64, int]] = {}
    for user, history, target in zip(
        split.valid.users.tolist(), split.valid.histories, split.valid.targets.tolist(), strict=True
    ):
        first.setdefault(user, (history, target))
    random = np.random.default_rng(settings.seed)
    users = random.permutation(sorted(first))[: settings.validation_users]
    histories = [first[int(user)][0][-settings.max_items :] for user in users]
    targets = np.array([first[int(user)][1] for user in users], dtype=np.int64)
    no_times = [np.zeros(len(row), dtype=np.int64) for row in histories]
    not_bought = [row.astype(bool) for row in no_times]
    return HeldOut(histories, targets, no_times, not_bought, profiles[users])
