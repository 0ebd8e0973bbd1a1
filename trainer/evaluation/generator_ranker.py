"""The product's generator as a ranker of the evaluation, trained by the update cycle's own code."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from registry.bundles.context import count_values, vocabulary
from registry.bundles.embedder import title_vectors
from registry.bundles.prompt import Prompt
from registry.bundles.ranking import Ranking, RepeatRule
from registry.bundles.rewards import with_reward_fields
from registry.decoding.list_rules import ListLimits
from registry.hold_out import HoldOut
from registry.settings import CodebookSettings
from trainer.codebooks.collaborative import collaborative_vectors, fuse_vectors
from trainer.codebooks.fit import assign_keeping, fit_codebook_to_vectors
from trainer.evaluation.ranker import MASKS, Head, Mask, Progress
from trainer.evaluation.sequences import flatten
from trainer.evaluation.splits import EvaluationSplit, TimeShard
from trainer.evaluation.validation import VALIDATION_USERS, validation_targets, validation_users
from trainer.generator.build import fresh_generator
from trainer.generator.constrained import SidSet
from trainer.generator.model import GeneratorForCausalLM
from trainer.generator.torch_generator import TorchGenerator
from trainer.offline_checks.ranking import Candidates, CatalogueRanker, in_histories
from trainer.offline_checks.served_lists import ServedLists
from trainer.rewards.labels import learn_rewards, purchase_labels, with_reward_labels
from trainer.sequences.batches import Int32, Int64
from trainer.sequences.held_out import TrainingSplit, split_log
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
    candidates: int = ListLimits.beam  # of each head, as in service
    # Budget of the training on the processor, in place of `max_seconds`; None: the trainer's own limits.
    cpu_seconds: float | None = None

    def with_trainer_settings(self, trainer: dict[str, Any]) -> TrainingRecipe:
        """The same recipe with other settings of the trainer."""
        return replace(self, trainer=self.trainer | trainer)


def tuned_recipe(epochs: int | None = None, members: int = 1) -> TrainingRecipe:
    """What `sidstream evaluate` trains: tuned on the validation part of Amazon Beauty, used for all sets."""
    return TrainingRecipe(
        trainer={
            "members": members,
            "width": 128, "layers": 2, "heads": 2, "ffn_factor": 4, "depth_factor": 2, "dropout": 0.5,
            "lr": 1e-3, "weight_decay": 0.0, "epochs": 20 if epochs is None else epochs, "patience": 5,
            "max_seconds": None, "validation_users": VALIDATION_USERS, "max_words": 0,
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
        self._cached_lists: tuple[RankedRequests, Candidates] | None = None
        self._weights: dict[Mask, float] = {}

    def fit(
        self, split: EvaluationSplit, seed: int, progress: Progress, teacher: TeacherTargets | None = None
    ) -> None:
        """Codebook, SIDs and generator of a split; once for all heads of one seed. `teacher`: see `train`."""
        if self._seed == seed and self._split is split:
            self._rank_after(0)
            return
        if self._first_member:
            self._first_member.fit(split, seed, progress)
        started = time.process_time()
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
        self.trained_s = time.process_time() - started
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
        few, seed = self.settings.validation_users, self.settings.seed
        held_out = validation_targets(split, few, seed, self.settings.max_items)
        self.held_out = held_out._replace(contexts=self.profiles[validation_users(split, few, seed)])
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

        first_member, settings, clock = self._first_member, self.settings, time.monotonic
        if self.recipe.cpu_seconds is not None:
            clock = time.process_time
            settings = settings.model_copy(update={"max_seconds": self.recipe.cpu_seconds})
        self.model, self.result = train_ensemble(
            new_member, self.rows, self.sid_set, settings, progress=progress, teacher=teacher,
            first_member=(first_member.model, first_member.result) if first_member else None,
            clock=clock,
        )  # fmt: skip
        quality = self.result.quality
        self.validation_ndcg = quality.ndcg10 if quality else 0.0
        self.ranking = quality.ranking if quality else Ranking(dense_weight=0.5)
        self.invalid_rate = 1.0 - quality.validity if quality else None
        # The model after so many shards; the first is the one that `fit` trained.
        self._models_after, self._shards_learned, self._weights = [self.model], 0, {}
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
        self.model, self._cached_lists = model, None
        self.ranker = CatalogueRanker(model, self.catalogue.codes, self.sid_set, self.recipe.candidates)

    def rank(
        self, histories: Sequence[Int64], k: int, mask: Mask, head: Head, users: Int64 | None = None
    ) -> Int64:
        """(B, k) item rows, best first, -1 where candidates end. `users` (B,); None: no profiles."""
        if head == "dense" and mask == "none":
            # The one head that needs no beam. As it is served (`mixed`), a list comes out of a beam search.
            newest, contexts = self._newest(histories), self._contexts(users)
            return _padded(self.ranker.best_items(newest, self.ranker.states(newest, contexts), k).numpy(), k)
        weight = self.dense_weight_under(mask) if head == "mixed" else float(head != "beam")
        return self.rank_mixed(histories, k, mask, weight, head in ("beam", "reordered"), users)

    def dense_weight_under(self, mask: Mask) -> float:
        """The weight of the dense head that validation chose for the lists of a mask."""
        if not self._weights:
            scorer, limits = TorchGenerator(self._models_after[0]), self.catalogue.limits
            rules: dict[Mask, RepeatRule] = {"none": RepeatRule(), "seen": RepeatRule(repeats="never")}
            for of_mask, rule in rules.items():
                catalogue = replace(self.catalogue, limits=replace(limits, repeats=rule))
                lists = ServedLists(scorer, self.held_out, catalogue, self.settings.max_items)
                self._weights[of_mask] = lists.fit_ranking()[0].dense_weight
        return self._weights[mask]

    def rank_mixed(
        self, histories: Sequence[Int64], k: int, mask: Mask, dense_weight: float, beam_only: bool = False,
        users: Int64 | None = None,
    ) -> Int64:  # fmt: skip
        """As `rank`, with another weight of the dense head."""
        candidates = self._candidates(self._newest(histories), self._contexts(users))
        allowed = torch.ones(candidates.items.shape, dtype=torch.bool)
        if beam_only:
            allowed[:, self.recipe.candidates :] = False
        if mask == "seen":
            allowed &= ~torch.from_numpy(in_histories(candidates.items, histories))
        return _padded(candidates.order(dense_weight, allowed)[:, :k].numpy(), k)

    def _newest(self, histories: Sequence[Int64]) -> list[Int64]:
        return [row[-self.settings.max_items :] for row in histories]

    def _contexts(self, users: Int64 | None) -> Int32 | None:
        return None if users is None else self.profiles[users]

    def _candidates(self, newest: list[Int64], contexts: Int32 | None) -> Candidates:
        """The candidates of both heads; those of the largest set of requests are kept.

        Every head and mask ranks the same ones.
        """
        requests = RankedRequests(*flatten(newest), contexts)
        if self._cached_lists is not None and self._cached_lists[0].equals(requests):
            return self._cached_lists[1]
        candidates = self.ranker.candidates(newest, self.ranker.states(newest, contexts))
        if self._cached_lists is None or len(newest) >= len(self._cached_lists[1].items):
            self._cached_lists = requests, candidates
        return candidates


def _padded(items: Int64, k: int) -> Int64:
    """Lists of up to k items -> (B, k), -1 where there is none."""
    lists = np.full((len(items), k), -1, dtype=np.int64)
    lists[:, : items.shape[1]] = items
    return lists


class RankedRequests(NamedTuple):
    """All that a set of lists is made of: histories, one after the other, and contexts."""

    items: Int64  # (N,)
    starts: Int64  # (B + 1,)
    contexts: Int32 | None  # (B, C)

    def equals(self, other: RankedRequests) -> bool:
        """Whether the lists of both are the same ones."""
        same_histories = np.array_equal(self.items, other.items) and np.array_equal(self.starts, other.starts)
        if self.contexts is None or other.contexts is None:
            return same_histories and self.contexts is other.contexts
        return same_histories and np.array_equal(self.contexts, other.contexts)


class GeneratorRanker:
    """One head of a trained generator, as a `Ranker` of the evaluation."""

    head: str

    def __init__(self, name: str, trained: TrainedGenerator, head: Head) -> None:
        self.name, self.head = name, head
        self.trained, self._head = trained, head

    def fit(self, split: EvaluationSplit, seed: int, progress: Progress) -> None:
        """Train, or take what another head trained."""
        self.trained.fit(split, seed, progress)
        model: GeneratorForCausalLM = self.trained.model
        self.parameters = sum(value.numel() for value in model.parameters())
        self.sids, self.trained_s = self.trained.sids, self.trained.trained_s
        self.invalid_rate = self.trained.invalid_rate
        self.validation_ndcg = self.trained.validation_ndcg
        if self._head == "mixed":
            # Part of fitting, not of the first answer.
            for mask in MASKS:
                self.trained.dense_weight_under(mask)

    def update(self, shard: TimeShard) -> None:
        """Learn a shard, or take what another head learned of it."""
        self.trained.update(shard)

    def rank(self, histories: Sequence[Int64], k: int, mask: Mask) -> Int64:
        """(B, k) item rows, best first."""
        return self.trained.rank(histories, k, mask, self._head)

    def rank_for(self, users: Int64, histories: Sequence[Int64], k: int, mask: Mask) -> Int64:
        """(B, k) item rows, best first, by the profiles of the users (B,) as well."""
        return self.trained.rank(histories, k, mask, self._head, users)


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
