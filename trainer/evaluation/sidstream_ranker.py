"""Our own generator under the evaluation: codebook, SFT and ranking by the update cycle's own code."""

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
from registry.settings import CodebookSettings
from trainer.codebooks.collaborative import collaborative_vectors, fuse_vectors
from trainer.codebooks.fit import assign_keeping, fit_codebook_to_vectors
from trainer.evaluation.ranker import Head, Mask, Progress
from trainer.evaluation.sequences import flatten
from trainer.evaluation.splits import Shard, Split
from trainer.generator.build import fresh_generator
from trainer.generator.constrained import SidSet
from trainer.generator.model import GeneratorForCausalLM
from trainer.offline.ranking import Candidates, CatalogueRanker, candidate_history
from trainer.rewards.labels import learn_rewards, purchase_labels, with_reward_labels
from trainer.sequences.batches import Int32, Int64
from trainer.sequences.held_out import HeldOut, hold_out_last_items
from trainer.sequences.held_out import TrainingSplit as Cut
from trainer.sequences.interactions import Interactions, training_catalogue
from trainer.sequences.rows import TrainingRows
from trainer.sequences.tokenizer import build_tokenizer
from trainer.settings import TrainerSettings
from trainer.tuning.ensemble import train_ensemble
from trainer.tuning.next_item import TeacherTargets
from trainer.tuning.sft import SftResult, train

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Recipe:
    """What is trained, apart from the seed."""

    trainer: dict[str, Any] = field(default_factory=dict)
    codebook: dict[str, Any] = field(default_factory=dict)
    candidates: int = 50  # of each head

    def under(self, trainer: dict[str, Any]) -> Recipe:
        """The same with other settings of the trainer."""
        return replace(self, trainer=self.trainer | trainer)


def recipe(max_seconds: float | None = None, epochs: int | None = None, members: int = 1) -> Recipe:
    """What `sidstream evaluate` trains: found on the validation part of Amazon Beauty, used for every set."""
    return Recipe(
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
) -> Recipe:
    """What `sidstream train` makes where nothing is set, in the demo, too; or that without a context.

    So many epochs are whole ones: the default budget in seconds holds only where neither is given.
    """
    given: dict[str, Any] = {} if context else {"context": {"max_fields": 0}}
    if epochs is not None:
        given |= {"epochs": epochs, "max_seconds": None}
    if max_seconds is not None:
        given["max_seconds"] = max_seconds
    return Recipe(trainer=given)


class Trained:
    """One trained generator, which several heads rank with."""

    def __init__(self, recipe: Recipe, first: Trained | None = None) -> None:
        """`first`: a generator of the same recipe but for its `members`; it becomes the first of them."""
        self.recipe, self._first = recipe, first
        self.result: SftResult
        self.trained_s = 0.0
        self._seed: int | None = None
        self._of: Split | None = None
        self._lists: dict[int, Candidates] = {}

    def fit(self, data: Split, seed: int, progress: Progress, teacher: TeacherTargets | None = None) -> None:
        """Codebook, SIDs and generator of a split; once for all heads of one seed. `teacher`: see `train`."""
        if self._seed == seed and self._of is data:
            self._stand(0)
            return
        if self._first:
            self._first.fit(data, seed, progress)
        began = time.monotonic()
        settings = TrainerSettings.model_validate(
            {"beat_popularity": False, **self.recipe.trainer, "seed": seed}
        )
        self.settings = settings
        codebook = CodebookSettings.model_validate(self.recipe.codebook)
        texts = _texts(data, progress)
        # Without texts there is nothing but what users did to make SIDs of.
        dim = codebook.collaborative_dim if codebook.collaborative or texts is None else 0
        if dim:
            vectors = collaborative_vectors(data.train, data.data.size, dim)
        if texts is not None:
            vectors = fuse_vectors(texts, vectors, codebook.collaborative) if dim else texts
        progress("codebook")
        # Without texts every dimension is collaborative, and there is no other part to tell them from.
        made = fit_codebook_to_vectors(vectors, "evaluation", codebook, 0 if texts is None else dim)
        sids = assign_keeping(made, vectors, [None] * len(vectors))
        self.sids = np.array(sids, dtype=np.int64)
        prompt = Prompt(made.sizes, settings.max_items)
        # Item rows are the order of the catalogue here: names sort as numbers do.
        names = [f"{row:09d}" for row in range(data.data.size)]
        known = training_catalogue(
            dict(zip(names, sids, strict=True)), dict(zip(names, data.data.texts, strict=True)), prompt
        )
        self.known, self.set = known, SidSet(sids, prompt)
        self.tokenizer = tokenizer = build_tokenizer(prompt, known.titles, settings.max_words)
        # Of the users that training knows, as in the update cycle: nothing of the others is learned.
        about = data.data.profiles or [{} for _ in data.data.users]
        trained = [told for told, items in zip(about, data.train, strict=True) if len(items)]
        limits = settings.context
        self.context = vocabulary(
            count_values({}, trained), len(tokenizer), limits.min_count, limits.max_values, limits.max_fields
        )
        # (U, C) token ids of each user's profile.
        self.profiles = self.context.rows(
            [None] * len(about), data.data.users, dict(zip(data.data.users, about, strict=True))
        )
        log = training_log(data, self.profiles)
        self.held = _held(data, settings, self.profiles)
        # All that these logs say of a purchase is that it happened: the time of a window does not matter.
        offers, bought = data.data.offers or [], purchase_labels(log, 0)
        self.rewards = learn_rewards(offers, log, bought, 0, settings.rewards) if offers else None
        self.context = with_reward_fields(self.context, self.rewards)
        log = with_reward_labels(log, offers, bought, self.rewards, self.context)
        cut = Cut(log.starts[1:].copy(), self.held)
        self.rows = rows = TrainingRows(log, cut, known, tokenizer, prompt, settings)

        def begin(own: TrainerSettings, part: TrainingRows, folder: Path | None) -> GeneratorForCausalLM:
            seen = texts if settings.text_inputs else None
            self.model = fresh_generator(known, seen, prompt, len(tokenizer), own, self.context.size)
            return self.model

        self.model, self.result = train_ensemble(
            begin, rows, self.set, settings, progress=progress, teacher=teacher,
            first_member=(self._first.model, self._first.result) if self._first else None,
        )  # fmt: skip
        self.ranker = CatalogueRanker(self.model, known.codes, self.set, self.recipe.candidates)
        quality = self.result.quality
        self.ranking = quality.ranking if quality else Ranking(dense_weight=0.5)
        self.invalid_rate = 1.0 - quality.validity if quality else None
        self._seed, self._of, self._lists = seed, data, {}
        self._stages, self._stage, self._lengths = [self.model], 0, [len(row) for row in data.train]
        self.trained_s = time.monotonic() - began + (self._first.trained_s if self._first else 0.0)

    def update(self, shard: Shard) -> None:
        """Go on learning, as a refresh of the update cycle does.

        Several heads are taken through the same shards one after the other: each shard is learned once.
        """
        if self._stage + 1 == len(self._stages):
            self._stages.append(self._refreshed(shard))
        self._stand(self._stage + 1)

    def _stand(self, stage: int) -> None:
        """Rank as after so many shards."""
        if self._stage != stage:
            self._stage = stage
            self.use(self._stages[stage])

    def _refreshed(self, shard: Shard) -> GeneratorForCausalLM:
        data = self._of
        assert data is not None, "fit comes first"
        before = list(self._lengths)
        for user, known, fresh in zip(shard.users.tolist(), shard.histories, shard.fresh, strict=True):
            self._lengths[user] = len(known) + len(fresh)
        log = training_log(data.until(self._lengths), self.profiles)
        pairs = zip(self._lengths, before, strict=True)
        log = replace(log, fresh=np.concatenate([np.arange(now) >= then for now, then in pairs]))
        log = with_reward_labels(
            log, data.data.offers or [], purchase_labels(log, 0), self.rewards, self.context
        )
        chosen = self.settings.model_copy(
            update={"lr": self.settings.refresh_lr, "seed": self.settings.seed + len(self._stages)}
        )
        after = hold_out_last_items(log, chosen, np.random.default_rng(chosen.seed))
        rows = TrainingRows(log, after, self.known, self.tokenizer, self.set.prompt, chosen)
        model = copy.deepcopy(self.model)
        train(model, rows, self.set, chosen)
        return model

    def use(self, model: GeneratorForCausalLM) -> None:
        """Rank with another model of the same codebook, catalogue and weight of the heads."""
        self.model, self._lists = model, {}
        self.ranker = CatalogueRanker(model, self.known.codes, self.set, self.recipe.candidates)

    def rank(
        self, histories: Sequence[Int64], k: int, mask: Mask, head: Head, users: Int64 | None = None
    ) -> Int64:
        """(B, k) item rows, best first, -1 where candidates end. `users` (B,), None: nobody is known."""
        weight = {"beam": 0.0, "reordered": 1.0, "dense": 1.0, "mixed": self.ranking.dense_weight}[head]
        return self.mixed(histories, k, mask, weight, head in ("beam", "reordered"), users)

    def mixed(
        self, histories: Sequence[Int64], k: int, mask: Mask, weight: float, beam_only: bool = False,
        users: Int64 | None = None,
    ) -> Int64:  # fmt: skip
        """As `rank`, by a weight of the dense head."""
        contexts = None if users is None else self.profiles[users]
        about = () if contexts is None else tuple(contexts.ravel().tolist())
        key = hash((about, *((len(row), int(row[-1]) if len(row) else -1) for row in histories)))
        found = self._lists.get(key)
        if found is None:
            newest = [row[-self.settings.max_items :] for row in histories]
            states = self.ranker.states(newest, contexts)
            if weight == 1 and mask == "none" and not beam_only:
                return self.ranker.best_items(newest, states, k).numpy()
            found = self.ranker.candidates(newest, states)
            # One set of histories, the largest: every head and mask asks for the same ones.
            if all(len(histories) >= len(kept.items) for kept in self._lists.values()):
                self._lists = {key: found}
        left = torch.ones(found.items.shape, dtype=torch.bool)
        if beam_only:
            left[:, self.recipe.candidates :] = False
        if mask == "seen":
            left &= ~torch.from_numpy(candidate_history(found.items, histories).in_history)
        order = found.order(weight, left)[:, :k].numpy()
        made = np.full((len(histories), k), -1, dtype=np.int64)
        made[:, : order.shape[1]] = order
        return made


class Ours:
    """One head of a trained generator, as the evaluation wants it."""

    head: str

    def __init__(self, name: str, trained: Trained, head: Head) -> None:
        self.name, self.head = name, head
        self._trained, self._head = trained, head

    def fit(self, data: Split, seed: int, progress: Progress) -> None:
        """Train, or take what another head trained."""
        self._trained.fit(data, seed, progress)
        model: GeneratorForCausalLM = self._trained.model
        self.parameters = sum(value.numel() for value in model.parameters())
        self.sids, self.trained_s = self._trained.sids, self._trained.trained_s
        self.invalid_rate = self._trained.invalid_rate

    def update(self, shard: Shard) -> None:
        """Learn a shard, or take what another head learned of it."""
        self._trained.update(shard)

    def rank(self, histories: Sequence[Int64], k: int, mask: Mask) -> Int64:
        """(B, k) item rows, best first."""
        return self._trained.rank(histories, k, mask, self._head)

    def rank_for(self, users: Int64, histories: Sequence[Int64], k: int, mask: Mask) -> Int64:
        """(B, k) item rows, best first, by what is known of the users (B,) as well."""
        return self._trained.rank(histories, k, mask, self._head, users)


def _texts(data: Split, progress: Progress) -> Float32 | None:
    if not any(data.data.texts):
        return None
    progress("text vectors")
    return title_vectors(data.data.texts)


def training_log(data: Split, profiles: Int32) -> Interactions:
    """The training histories as the trainer's log. Times are 0 where the data set has none."""
    items, starts = flatten(data.train)
    count = len(items)
    ts = np.zeros(count, dtype=np.int64)
    if data.data.ts is not None:
        ts, _ = flatten([row[: len(kept)] for row, kept in zip(data.data.ts, data.train, strict=True)])
    bought = np.zeros(count, dtype=bool)
    if data.bought is not None:
        bought = np.concatenate([*data.bought, bought[:0]])
    return Interactions(
        [str(user) for user in range(len(data.train))], starts, items, ts,
        np.ones(count, dtype=bool), bought, np.repeat(profiles, np.diff(starts), axis=0),
        np.zeros((count, 0), dtype=np.int32),
    )  # fmt: skip


def _held(data: Split, settings: TrainerSettings, profiles: Int32) -> HeldOut:
    """Validation targets: each its user's row after the training part, up to `validation_users` of them."""
    last: dict[int, tuple[Int64, int]] = {}
    for user, history, target in zip(
        data.valid.users.tolist(), data.valid.histories, data.valid.targets.tolist(), strict=True
    ):
        last.setdefault(user, (history, target))
    rng = np.random.default_rng(settings.seed)
    drawn = rng.permutation(sorted(last))[: settings.validation_users]
    size = settings.max_items
    histories = [last[int(user)][0][-size:] for user in drawn]
    targets = np.array([last[int(user)][1] for user in drawn], dtype=np.int64)
    none = [np.zeros(len(row), dtype=np.int64) for row in histories]
    unbought = [row.astype(bool) for row in none]
    return HeldOut(histories, targets, none, unbought, profiles[drawn])
