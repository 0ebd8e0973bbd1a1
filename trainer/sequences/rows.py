"""What the generator learns from: users' sequences of items and texts, as rows of token ids and labels."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from registry.bundles.prompt import BOS, EOS, ITEM, TITLE, UNK, Prompt
from trainer.sequences.batches import (
    Int32,
    Int64,
    SequenceBatch,
    TokenRow,
    batches_of_similar_length,
    pad_contexts,
)
from trainer.sequences.held_out import TrainingSplit
from trainer.sequences.interactions import Interactions, TrainingCatalogue
from trainer.sequences.labelled_answers import LabelledAnswers
from trainer.sequences.tasks import TitleWords, bought_within, search_prompt, summary_prompt
from trainer.settings import TrainerSettings


class TrainingRows:
    """The rows of one epoch after another. The same seed and epoch give the same rows in the same order."""

    def __init__(
        self, split: TrainingSplit, catalogue: TrainingCatalogue, tokenizer: PreTrainedTokenizerFast,
        prompt: Prompt, settings: TrainerSettings, labelled_answers: LabelledAnswers | None = None,
    ) -> None:  # fmt: skip
        """`labelled_answers` are learned beside the log, but for those of items without an interaction."""
        self.split, self.catalogue, self.prompt, self.settings = split, catalogue, prompt, settings
        self.log: Interactions = split.log
        # An item without interactions would only be pushed away (trainer.tuning.next_item.ScoredItems).
        self.labelled_answers = labelled_answers.of_items(self.trained_items) if labelled_answers else None
        self.title_words = [self._word_ids(title, tokenizer) for title in catalogue.titles]
        self.words = TitleWords(self.title_words)
        self.led_to_purchase = bought_within(self.log, settings.tasks.buy_within_s * 1000)

    def _word_ids(self, title: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
        ids = tokenizer(title, add_special_tokens=False).input_ids if title else []
        # A title may hold the text of a code or a special token: as a word it is unknown.
        return [token if token >= self.prompt.first_word else UNK for token in ids][
            : self.settings.title_words
        ]

    @property
    def trained_items(self) -> Int64:
        """The items of the training part, ascending; held-out targets stand for what is not known yet."""
        return np.unique(self.log.items)

    def newest_share(self, share: float, settings: TrainerSettings) -> TrainingRows:
        """These rows where only the newest `share` of the training part's events are new.

        Events at the time of the oldest of them are new, too. A log without times is new as a whole.
        """
        ts = np.sort(self.log.ts)
        since = ts[min(len(ts) - 1, round((1 - share) * len(ts)))]
        rows = self.with_settings(settings)
        rows.log = replace(self.log, fresh=self.log.ts >= since)
        return rows

    def with_settings(self, settings: TrainerSettings) -> TrainingRows:
        """These rows in the order, and cut at the places, of another seed."""
        rows = copy.copy(self)
        rows.settings = settings
        return rows

    def with_fewer_held_out(self, users: int) -> TrainingRows:
        """These rows with the first `users` of those held out."""
        rows = copy.copy(self)
        held_out = self.split.held_out
        rows.split = replace(self.split, held_out=held_out.take(np.arange(min(users, len(held_out.targets)))))
        return rows

    def sequence_row(self, start: int, end: int) -> TokenRow:
        """Next SID at every position of rows start to end: every code is a label.

        An item equal to the one right before it is read, but not learned: a page's own item is no answer.
        """
        items = self.log.items[start:end]
        ids = np.concatenate(([BOS], self.catalogue.codes[items].ravel()))
        learned = np.ones(len(ids), dtype=bool)
        learned[0] = False
        repeats = np.flatnonzero(items[1:] == items[:-1]) + 1
        levels = len(self.prompt.sizes)
        learned[(1 + repeats[:, None] * levels + np.arange(levels)).ravel()] = False
        return TokenRow(ids, learned, self.settings.weights.next_sid)

    def sid_to_title_row(self, item: int) -> TokenRow:
        """BOS, the item, TITLE, then the words and EOS, which are learned."""
        words = self.title_words[item]
        ids = np.array([BOS, *self.catalogue.codes[item], TITLE, *words, EOS], dtype=np.int64)
        return TokenRow(
            ids, np.arange(len(ids)) >= len(ids) - len(words) - 1, self.settings.weights.sid_to_title
        )

    def title_to_sid_row(self, item: int) -> TokenRow:
        """BOS, the words, ITEM, then the item's codes, which are learned."""
        ids = np.array([BOS, *self.title_words[item], ITEM, *self.catalogue.codes[item]], dtype=np.int64)
        levels = len(self.prompt.sizes)
        return TokenRow(ids, np.arange(len(ids)) >= len(ids) - levels, self.settings.weights.title_to_sid)

    def search_row(self, at: int, words: Sequence[int], bare: bool) -> TokenRow:
        """A search that led to the log's row `at`, whose item's codes are learned (see `search_prompt`).

        The history is what its user did before; `bare`: none is given.
        """
        history = self.catalogue.codes[self._history_before(at, at)[: 0 if bare else None]]
        codes = self.catalogue.codes[self.log.items[at]]
        ids = np.array([*search_prompt(history, words), *codes], dtype=np.int64)
        return TokenRow(ids, np.arange(len(ids)) >= len(ids) - len(codes), self.settings.weights.search)

    def summary_row(self, history: Int64) -> TokenRow:
        """A history's items (H,), then the words most typical of their titles and EOS, which are learned."""
        titles = [self.title_words[item] for item in history]
        words = self.words.typical(titles, self.settings.tasks.summary_words)
        prompt = summary_prompt(self.catalogue.codes[history])
        ids = np.array([*prompt, *words, EOS], dtype=np.int64)
        return TokenRow(ids, np.arange(len(ids)) >= len(prompt), self.settings.weights.summary)

    def _history_before(self, at: int, end: int) -> Int64:
        """The newest items before row `end` of the user of row `at`, as many as a text's history has."""
        begin = self.log.starts[np.searchsorted(self.log.starts, at, side="right") - 1]
        return self.log.items[max(begin, end - self.settings.tasks.history) : end]

    def _draw_events(self, rng: np.random.Generator) -> list[int]:
        """As many rows of the training part as items have a title, drawn at random.

        Each row's item has a known word, and is not the one right before it: a page's own item is no answer.
        """
        rows = np.arange(len(self.log))
        user = np.searchsorted(self.log.starts, rows, side="right") - 1
        has_known_word = np.array(
            [any(word in self.words.idf for word in title) for title in self.title_words], dtype=bool
        )
        repeats_previous = np.zeros(len(rows), dtype=bool)
        repeats_previous[1:] = (self.log.items[1:] == self.log.items[:-1]) & (user[1:] == user[:-1])
        candidates = rows[has_known_word[self.log.items] & ~repeats_previous]
        return rng.choice(candidates, sum(map(bool, self.title_words))).tolist() if len(candidates) else []

    def search_rows(self, number: int) -> list[TokenRow]:
        """The queries of epoch `number`: random words of the titles that users went to."""
        rng = np.random.default_rng((self.settings.seed, number, 8))
        limits = self.settings.tasks
        rows = []
        for at in self._draw_events(rng):
            words = self.words.draw_query(self.title_words[self.log.items[at]], limits.query_words, rng)
            rows.append(self.search_row(at, words, bool(rng.random() < limits.bare)))
        return rows

    def summary_rows(self, number: int) -> list[TokenRow]:
        """The summaries of epoch `number`: of histories that end at random places."""
        rng = np.random.default_rng((self.settings.seed, number, 5))
        return [self.summary_row(self._history_before(at, at + 1)) for at in self._draw_events(rng)]

    def crops(self, rng: np.random.Generator) -> list[tuple[int, int]]:
        """Pieces (start, end) of users' sequences: all with new events, and a share of older ones."""
        # One more than a prompt holds: the last target sees a full prompt. Random cuts: over the epochs every
        # item is predicted from short and from long pasts.
        size = self.settings.max_items + 1
        fresh: list[tuple[int, int]] = []
        older: list[tuple[int, int]] = []
        for user, end in enumerate(self.log.starts[1:]):
            begin = int(self.log.starts[user])
            if end - begin < self.settings.min_history:
                continue
            cut = begin + int(rng.integers(1, size + 1))
            bounds = [begin, *range(cut, int(end), size), int(end)]
            for low, high in pairwise(bounds):
                if high - low < 1:
                    continue
                (fresh if self.log.fresh[low:high].any() else older).append((low, high))
        share = self.settings.replay
        replayed = min(len(older), round(len(fresh) * share / (1 - share)))
        chosen = rng.permutation(len(older))[:replayed]
        return fresh + [older[at] for at in chosen]

    def text_rows(self, number: int) -> list[TokenRow]:
        """The rows of epoch `number` that join SIDs and words, shuffled."""
        weights = self.settings.weights
        named = [item for item, words in enumerate(self.title_words) if words]
        rows = [self.sid_to_title_row(item) for item in named if weights.sid_to_title > 0]
        rows += [self.title_to_sid_row(item) for item in named if weights.title_to_sid > 0]
        rows += self.search_rows(number) if weights.search > 0 else []
        rows += self.summary_rows(number) if weights.summary > 0 else []
        rng = np.random.default_rng((self.settings.seed, number, 2))
        return [rows[at] for at in rng.permutation(len(rows))]

    def epoch_rows(self, number: int) -> list[TokenRow]:
        """All rows of epoch `number`, unordered."""
        rng = np.random.default_rng((self.settings.seed, number))
        return [self.sequence_row(low, high) for low, high in self.crops(rng)] + self.text_rows(number)

    def sequence_batches(self, number: int) -> list[SequenceBatch]:
        """The sequences of an epoch in batches of similar length and about `batch_positions` items, shuffled.

        An item equal to the one right before it is read, but not learned, as in `sequence`.
        """
        crops = np.array(self.crops(np.random.default_rng((self.settings.seed, number)))).reshape(-1, 2)
        last_item_only = self.settings.samples == "prefix"
        if last_item_only:
            crops = self._prefixes(crops)
        contexts = self.contexts(crops, number)
        rng = np.random.default_rng((self.settings.seed, number, 1))
        length = crops[:, 1] - crops[:, 0]
        order = np.lexsort((rng.random(len(crops)), length))
        batches = []
        for batch in batches_of_similar_length(order, length, self.settings.batch_positions):
            width = int(length[batch].max())
            items = np.full((len(batch), width), -1, dtype=np.int64)
            bought = np.zeros(items.shape, dtype=bool)
            for row, (low, high) in enumerate(crops[batch].tolist()):
                items[row, : high - low] = self.log.items[low:high]
                bought[row, : high - low] = self.led_to_purchase[low:high]
            learned = items >= 0
            learned[:, 1:] &= items[:, 1:] != items[:, :-1]
            if last_item_only:
                learned &= np.arange(width) == length[batch, None] - 1
            context = pad_contexts([contexts[row] for row in batch], width)
            batches.append(
                SequenceBatch(
                    torch.from_numpy(items), torch.from_numpy(learned), context, torch.from_numpy(bought)
                )
            )
        if self.labelled_answers:
            events = sum(int(sequences.learned.sum()) for sequences in batches)
            max_answers = round(self.settings.rewards.ignored_share * events)
            batches += self.labelled_answers.sequence_batches(self.settings, number, max_answers)
        return [batches[at] for at in rng.permutation(len(batches))]

    def _prefixes(self, crops: Int64) -> Int64:
        """For every event of the crops (start, end) that has a past, its prefix (start, end), itself last."""
        ends = np.concatenate([np.arange(low + 1, high + 1) for low, high in crops] or [crops[:, 1]])
        begins = self.log.starts[np.searchsorted(self.log.starts, ends, side="left") - 1]
        # As long as a crop at most: its target sees a full prompt.
        begins = np.maximum(begins, ends - self.settings.max_items - 1)
        return np.stack((begins, ends), axis=1)[ends - begins > 1]

    def contexts(self, crops: Int64, number: int) -> list[Int32]:
        """The contexts (P, C) of each piece (start, end) in epoch `number`.

        A share `context.dropout` of pieces is without any, so that requests without one are answered well.
        Rewards stand behind it, each event's own.
        """
        rng = np.random.default_rng((self.settings.seed, number, 3))
        keep_context = rng.random(len(crops)) >= self.settings.context.dropout
        rewards = self._rewards_of_epoch(number)
        return [
            np.concatenate((self.log.context[low:high] * np.int32(keep), rewards[low:high]), axis=1)
            for (low, high), keep in zip(crops.tolist(), keep_context.tolist(), strict=True)
        ]

    def _rewards_of_epoch(self, number: int) -> Int32:
        """What epoch `number` tells of the rewards of each event (N, R).

        A share `rewards.unconditioned` of events is told nothing of them, so that a request without wishes
        is answered well; of the others a share `rewards.dropout` of each field, so that one wish needs no
        others (condition dropout).
        """
        rewards, settings = self.log.rewards, self.settings.rewards
        rng = np.random.default_rng((self.settings.seed, number, 4))
        visible = rng.random(rewards.shape) >= settings.dropout
        visible &= rng.random((len(rewards), 1)) >= settings.unconditioned
        return rewards * visible.astype(np.int32)
