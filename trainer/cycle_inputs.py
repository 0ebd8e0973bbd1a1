"""What one cycle works with: the champion to go on from, the window, its sequences, and what is held out."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from registry.bundles.bundle import Bundle
from registry.bundles.codebook import Codebook
from registry.bundles.context import Attributes, Context, vocabulary
from registry.bundles.context import read as read_context
from registry.bundles.embedder import title_vectors
from registry.bundles.prompt import Prompt
from registry.bundles.rewards import Rewards, with_rewards, without_rewards
from registry.bundles.rewards import read as read_rewards
from registry.bundles.store import CHAMPION, Registry
from streams.errors import SidstreamError
from streams.events import CatalogItem
from streams.settings import KafkaSettings
from trainer.generator.constrained import SidSet
from trainer.log.log import Log
from trainer.log.window import Window, read_window
from trainer.offline.offpolicy import LoggedExplorations, logged_explorations
from trainer.rewards.labels import extend_rewards, learn_rewards, purchase_labels, with_reward_labels
from trainer.rewards.negative_feedback import unclicked_answers
from trainer.sequences.batches import Int64
from trainer.sequences.held_out import TrainingSplit, hold_out_last_items
from trainer.sequences.interactions import Interactions, TrainingCatalogue, training_catalogue
from trainer.sequences.labelled_answers import LabelledAnswers
from trainer.sequences.tokenizer import build_tokenizer
from trainer.settings import TrainerSettings


@dataclass(frozen=True)
class CycleInputs:
    """Everything a cycle reads, read once."""

    window: Window
    codebook: Codebook
    prompt: Prompt
    parent: Bundle | None  # the champion, after whose window this one begins; None: fresh weights
    # Whose weights SFT goes on from: the champion's or, where it is aligned, those it was aligned from. SFT
    # from aligned weights would undo what they learned of preferences, and the pairs be learned twice.
    start_bundle: Bundle | None
    catalogue: TrainingCatalogue
    log: Interactions
    split: TrainingSplit
    sids: SidSet
    text_vectors: (
        npt.NDArray[np.float32] | None
    )  # (I, T) a vector of each item's text; None: the generator sees none
    tokenizer: PreTrainedTokenizerFast
    context: Context  # the parent's; without one, what this window says often enough
    rewards: Rewards | None  # the parent's; without one, those of this window; None: nothing is known of any
    profiles: Mapping[str, Attributes]
    offers: Sequence[CatalogItem | None]  # what is known of each item of the catalogue
    led_to_purchase: Int64  # (N,) whether each event of the log is or led to a purchase (trainer.rewards)
    explored: LoggedExplorations | None  # answers drawn by chance whose click window closed in this window
    negative_feedback: (
        LabelledAnswers | None
    )  # those of them that were not clicked, where requests can ask for clicks


@contextlib.contextmanager
def cycle_lock(home: Path) -> Iterator[None]:
    """Hold the home folder's lock. Raises SidstreamError when another cycle has it."""
    home.mkdir(parents=True, exist_ok=True)
    with (home / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise SidstreamError(
                f"another cycle works in {home}: wait for it, "
                "or set SIDSTREAM_TRAINER__HOME to another folder"
            ) from error
        yield


def read_cycle_inputs(
    settings: TrainerSettings,
    kafka: KafkaSettings,
    registry: Registry,
    *,
    from_scratch: bool,
    horizon_ms: int,
    window_ms: int,
    reading: Callable[[int], None] | None = None,
) -> CycleInputs:
    """Read the window since the champion's. `reading(n)`: n records were read from Kafka so far.

    A click counts for an answer within `horizon_ms` after it, and led to a purchase where its user bought the
    item within `window_ms` after it. Raises SidstreamError where no item has a SID, or nobody has touched
    one.
    """
    codebook = registry.codebook()
    parent = registry.fetch(CHAMPION) if registry.alias(CHAMPION) is not None and not from_scratch else None
    if parent is not None and parent.manifest.codebook != codebook.id:
        # Its codes mean other items: nothing of the weights carries over.
        parent = None
    read = 0

    def advance(count: int) -> None:
        nonlocal read
        read += count
        if reading:
            reading(read)

    window = read_window(
        kafka, Log.open(settings.home / "log"), parent.manifest.window if parent else None, advance
    )
    prompt = parent.prompt if parent else Prompt(codebook.sizes, settings.max_items)
    sids = window.sids(codebook.id)
    if not sids:
        raise SidstreamError(
            f"no item has a SID under codebook {codebook.id}: "
            "publish a catalogue, then `sidstream codebook fit`"
        )
    listed = window.catalogue_records()
    known = training_catalogue(sids, {item: one.title for item, one in listed.items()}, prompt)
    profiles = window.profiles()
    if parent is None:
        tokenizer = build_tokenizer(prompt, known.titles, settings.max_words)
        limits = settings.context
        context = vocabulary(
            window.context_counts(profiles),
            len(tokenizer),
            limits.min_count,
            limits.max_values,
            limits.max_fields,
        )
    else:
        # A refresh says nothing that the weights have never heard.
        tokenizer, context = AutoTokenizer.from_pretrained(parent.model), read_context(parent.path)
    log = window.user_sequences(known, without_rewards(context), profiles)
    if not len(log):
        raise SidstreamError(
            "there are no clicks or purchases of known items to learn from: "
            "send some, for example with `sidstream replay online-retail`"
        )
    offers, bought = [listed.get(item) for item in known.item_ids], purchase_labels(log, window_ms)
    found = window.explorations(horizon_ms)
    unclicked = sum(not clicked for _, clicked in found)
    if parent is None:
        rewards = learn_rewards(offers, log, bought, unclicked, settings.rewards)
        said, context = len(context.fields), with_rewards(context, rewards)
    else:
        said, rewards = len(without_rewards(context).fields), read_rewards(parent.path)
        rewards = rewards and extend_rewards(rewards, bought, unclicked, settings.rewards, context)
    log = with_reward_labels(log, offers, bought, rewards, context)
    logged = logged_explorations(found, codebook.id, prompt, settings.offpolicy, context)
    split = hold_out_last_items(log, settings, np.random.default_rng(settings.seed))
    text = None
    if settings.text_inputs:
        text = title_vectors(known.titles)
    start = registry.tuned_from(parent) if parent else None
    return CycleInputs(
        window, codebook, prompt, parent, start, known, log, split, SidSet(known.sids, prompt), text,
        tokenizer, context, rewards, profiles, offers, bought, logged,
        unclicked_answers(logged, known, offers, rewards, context, said),
    )  # fmt: skip
