"""What one cycle works with: the champion to go on from, the window, its sequences, and what is held out."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from registry.arms import CHAMPION
from registry.bundles.bundle import Bundle
from registry.bundles.codebook import Codebook
from registry.bundles.context import Attributes, Context, vocabulary
from registry.bundles.context import read as read_context
from registry.bundles.embedder import title_vectors
from registry.bundles.prompt import Prompt
from registry.bundles.rewards import Rewards, with_reward_fields, without_reward_fields
from registry.bundles.rewards import read as read_rewards
from registry.bundles.store import Registry
from registry.decoding.list_rules import ListLimits
from registry.hold_out import HoldOut
from streams.errors import SidstreamError
from streams.events import CatalogItem
from streams.settings import KafkaSettings
from trainer.generator.constrained import SidSet
from trainer.log.interaction_log import InteractionLog
from trainer.log.window import Window, read_window
from trainer.offline_checks.offpolicy import LoggedExplorations, logged_explorations
from trainer.rewards.labels import extend_rewards, learn_rewards, purchase_labels, with_reward_labels
from trainer.rewards.negative_feedback import unclicked_answers
from trainer.sequences.batches import Int64
from trainer.sequences.held_out import TrainingSplit, split_log, without_validation_users
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
    hold_out: HoldOut  # the validation users of the lineage
    catalogue: TrainingCatalogue
    split: TrainingSplit
    sids: SidSet
    # (I, T) a vector of each item's text; None: the generator sees none
    text_vectors: npt.NDArray[np.float32] | None
    tokenizer: PreTrainedTokenizerFast
    context: Context  # the parent's; without one, what this window says often enough
    rewards: Rewards | None  # the parent's; without one, those of this window; None: nothing is known of any
    profiles: Mapping[str, Attributes]
    offers: Sequence[CatalogItem | None]  # what is known of each item of the catalogue
    led_to_purchase: Int64  # (N,) whether each event of the log is or led to a purchase (trainer.rewards)
    # Answers drawn by chance whose click window closed in this window, without those to validation users.
    explorations: LoggedExplorations | None
    # Those of them that were not clicked, where requests can ask for clicks.
    negative_feedback: LabelledAnswers | None
    # Answers to validation users, drawn by chance, whose click window has closed: of all windows, since
    # nothing is ever learned from them.
    judging_explorations: LoggedExplorations | None

    @property
    def log(self) -> Interactions:
        """What is learned from: the sequences of all users but the validation users."""
        return self.split.log


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
    limits: ListLimits | None = None,
    *,
    from_scratch: bool,
    horizon_ms: int,
    window_ms: int,
    reading: Callable[[int], None] | None = None,
) -> CycleInputs:
    """Read the window since the champion's. `reading(n)` is called after n records were read.

    `limits`: those of serving's lists (None: serving's defaults).

    A click counts for an answer within `horizon_ms` after it, and led to a purchase where its user bought the
    item within `window_ms` after it. Raises SidstreamError where no item has a SID, or no event of such an
    item is there.
    """
    codebook = registry.codebook()
    parent = None if from_scratch else _parent_bundle(registry, codebook)
    window = _read_new_window(settings, kafka, parent, reading)
    start = registry.alignment_reference(parent) if parent else None
    return inputs_of_window(
        settings, window, codebook, parent, start, limits, horizon_ms=horizon_ms, window_ms=window_ms
    )


def hold_out_of_lineage(settings: TrainerSettings, parent: Bundle | None) -> HoldOut:
    """The validation users of this cycle: those that the settings name.

    Raises SidstreamError where the parent may have learned from some of them: what is scored on them would
    be a training figure.
    """
    hold_out = HoldOut(share=settings.validation_share)
    if parent is None or not hold_out.share:
        return hold_out
    learned_without = parent.manifest.validation
    if learned_without is None or not learned_without.covers(hold_out):
        share = learned_without.share if learned_without else 0.0
        raise SidstreamError(
            f"SIDSTREAM_TRAINER__VALIDATION_SHARE is {hold_out.share:g}, and bundle {parent.id} learned from "
            f"some of these users: it left out a share of {share:g}. Set it to {share:g}, or make a codebook "
            "and a model without them: `sidstream codebook fit`, then `sidstream train --from-scratch`"
        )
    return hold_out


def inputs_of_window(
    settings: TrainerSettings, window: Window, codebook: Codebook, parent: Bundle | None,
    start_bundle: Bundle | None, limits: ListLimits | None = None, *, horizon_ms: int, window_ms: int,
) -> CycleInputs:  # fmt: skip
    """What a cycle learns from a window, and what judges it: the only place where the two are told apart.

    `limits`: those of serving's lists (None: serving's defaults).
    Raises SidstreamError as `read_cycle_inputs` does.
    """
    hold_out = hold_out_of_lineage(settings, parent)
    prompt = parent.prompt if parent else Prompt(codebook.sizes, settings.max_items)
    records = window.catalogue_records()
    catalogue = _catalogue_with_sids(window, codebook, records, prompt, limits)
    profiles = window.profiles()
    tokenizer, context = _vocabulary(settings, window, parent, catalogue, profiles, prompt, hold_out)
    split = split_log(
        window.user_sequences(catalogue, without_reward_fields(context), profiles), hold_out, settings
    )
    log = split.log
    if not len(log):
        raise SidstreamError(
            "there are no clicks or purchases of known items to learn from: "
            "send some, for example with `sidstream replay online-retail`"
        )
    offers = [records.get(item) for item in catalogue.item_ids]
    led_to_purchase = purchase_labels(log, window_ms)
    explored, judging = without_validation_users(
        window.explorations(horizon_ms, hold_out), lambda pair: pair[0].user_id, hold_out
    )
    unclicked = sum(not clicked for _, clicked in explored)
    request_fields = len(without_reward_fields(context).fields)
    if parent is None:
        rewards = learn_rewards(offers, log, led_to_purchase, unclicked, settings.rewards)
        context = with_reward_fields(context, rewards)
    else:
        rewards = read_rewards(parent.path)
        rewards = rewards and extend_rewards(rewards, led_to_purchase, unclicked, settings.rewards, context)
    log = with_reward_labels(log, offers, led_to_purchase, rewards, context)
    explorations, judging_explorations = (
        logged_explorations(events, codebook.id, prompt, settings.offpolicy, context)
        for events in (explored, judging)
    )
    return CycleInputs(
        window=window, codebook=codebook, prompt=prompt, parent=parent, start_bundle=start_bundle,
        hold_out=hold_out, catalogue=catalogue, split=replace(split, log=log),
        sids=SidSet(catalogue.sids, prompt),
        text_vectors=title_vectors(catalogue.titles) if settings.text_inputs else None, tokenizer=tokenizer,
        context=context, rewards=rewards, profiles=profiles, offers=offers, led_to_purchase=led_to_purchase,
        explorations=explorations,
        negative_feedback=unclicked_answers(
            explorations, catalogue, offers, rewards, context, request_fields
        ),
        judging_explorations=judging_explorations,
    )  # fmt: skip


def _parent_bundle(registry: Registry, codebook: Codebook) -> Bundle | None:
    """The champion, where there is one and its codes mean the items of this codebook."""
    if registry.alias(CHAMPION) is None:
        return None
    champion = registry.fetch(CHAMPION)
    return champion if champion.manifest.codebook == codebook.id else None


def _read_new_window(
    settings: TrainerSettings, kafka: KafkaSettings, parent: Bundle | None,
    reading: Callable[[int], None] | None,
) -> Window:  # fmt: skip
    """The window that begins where the parent's ended."""
    total = 0

    def advance(records: int) -> None:
        nonlocal total
        total += records
        if reading:
            reading(total)

    log = InteractionLog.open(settings.home / "log")
    return read_window(kafka, log, parent.manifest.window if parent else None, advance)


def _catalogue_with_sids(
    window: Window, codebook: Codebook, records: Mapping[str, CatalogItem], prompt: Prompt,
    limits: ListLimits | None,
) -> TrainingCatalogue:  # fmt: skip
    """The items that have a SID under the codebook. Raises SidstreamError where none has."""
    sids = window.sids(codebook.id)
    if not sids:
        raise SidstreamError(
            f"no item has a SID under codebook {codebook.id}: "
            "publish a catalogue, then `sidstream codebook fit`"
        )
    return training_catalogue(
        sids, {item: record.title for item, record in records.items()}, prompt,
        active={item for item, record in records.items() if record.active}, limits=limits,
    )  # fmt: skip


def _vocabulary(
    settings: TrainerSettings, window: Window, parent: Bundle | None, catalogue: TrainingCatalogue,
    profiles: Mapping[str, Attributes], prompt: Prompt, hold_out: HoldOut,
) -> tuple[PreTrainedTokenizerFast, Context]:  # fmt: skip
    """The parent's tokenizer and context, since its weights have no other tokens; else this window's."""
    if parent is not None:
        return AutoTokenizer.from_pretrained(parent.model), read_context(parent.path)
    tokenizer = build_tokenizer(prompt, catalogue.titles, settings.max_words)
    limits = settings.context
    return tokenizer, vocabulary(
        window.context_counts(profiles, hold_out), len(tokenizer), limits.min_count, limits.max_values,
        limits.max_fields,
    )  # fmt: skip
