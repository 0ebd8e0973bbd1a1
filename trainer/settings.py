"""Settings of the trainer: the generator's shape, SFT, preference alignment, windows and the schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import platformdirs
from pydantic import Field

from streams.events import Scheme
from streams.settings import Section

# Of the matrix products of training; trainer.tuning.devices says what "auto" is on a processor.
Arithmetic = Literal["auto", "float32", "bfloat16"]


class TaskWeights(Section):
    """How much each task of SFT counts in the loss."""

    next_sid: float = Field(1.0, ge=0, description="the next item's SID, at every position")
    next_item: float = Field(1.0, ge=0, description="the next item itself, by the dense head")
    sid_to_title: float = Field(0.1, ge=0, description="an SID's title, word by word")
    title_to_sid: float = Field(0.1, ge=0, description="a title's SID")
    search: float = Field(0.0, ge=0, description="the SID of what a user went to, after words of its title")
    summary: float = Field(0.0, ge=0, description="the words most typical of a history's titles")
    purchase: float = Field(
        1.0,
        gt=0,
        description="a target that was bought, over any other one, in the next item and its SID; not in LoRA",
    )


class TaskSettings(Section):
    """What the rows of the tasks beside the next item look like."""

    buy_within_s: int = Field(
        1800, ge=0, description="a target counts as bought where its user buys it at most so long after it"
    )
    history: int = Field(10, ge=1, description="items before a query, or of a summary; the newest kept")
    bare: float = Field(0.3, ge=0, le=1, description="share of queries without a history")
    query_words: int = Field(3, ge=1, description="words of a query, at most")
    summary_words: int = Field(5, ge=1, description="words of a summary, at most")


class PretrainSettings(Section):
    """Pretraining: a model from scratch first learns from the whole log, then SFT from its newest part.

    The newest part is mixed with older sequences as in a refresh (`replay`). Refreshes have no such stage.
    """

    share: float = Field(
        0.0, ge=0, lt=1, description="share of `epochs` and `max_seconds` for pretraining; 0: none"
    )
    recent_share: float = Field(
        0.5, gt=0, le=1, description="share of the log, its newest events, that SFT learns from"
    )
    sft_lr: float = Field(1e-3, gt=0, description="peak learning rate of the SFT that follows")


class DpoSettings(Section):
    """Preference optimisation, jointly with the next-token loss."""

    # All of what was passed over, and a strong pull back: docs/decisions/0010.
    loss: Literal["dpo", "softmax_dpo"] = Field(
        "softmax_dpo",
        description="dpo: each rejected answer on its own (Rafailov et al. 2023); softmax_dpo: all of a pair "
        "together (Chen et al. 2024)",
    )
    beta: float = Field(1.0, gt=0, description="strength of the pull to the reference")
    dynamic_beta: bool = Field(
        False, description="let beta follow each batch's gap, and leave outliers out (Wu et al. 2024)"
    )
    beta_scale: float = Field(
        0.6, ge=0, description="how much a dynamic beta follows the gap; 0: only outliers are left out"
    )
    beta_momentum: float = Field(0.9, ge=0, lt=1, description="of the running mean of gaps")
    left_out: float = Field(0.2, ge=0, lt=1, description="share of a batch that a dynamic beta leaves out")
    # Measured with shoppers whose tastes are known (docs/decisions/0004): at .03 beside 1 nothing moves.
    weight: float = Field(1.0, ge=0, description="weight of the preference term")
    sft_weight: float = Field(0.1, ge=0, description="weight of the chosen item's next-token loss")
    replay_weight: float = Field(
        0.1, ge=0, description="weight of the next-item loss on the log's sequences, which keeps the clicks"
    )
    # Of both heads: docs/decisions/0010 has what it buys and costs.
    lr: float = Field(4e-4, gt=0, description="learning rate; not above that of the refresh before it")
    epochs: int = Field(1, ge=1, description="passes over the pairs; more than one was published as harmful")
    batch: int = Field(64, ge=1, description="pairs a step")
    # Alignment starts anew in each cycle: as many pairs each time is as strong a pull each time.
    max_pairs: int = Field(
        8000,
        ge=1,
        description="pairs of a cycle, the newest of each scheme in equal shares, older windows' too",
    )
    # More than three gain nothing more, and each is one more sequence of a step.
    max_rejected: int = Field(3, ge=1, description="K, the rejected SIDs of one pair that are used")
    hard_negatives: int = Field(
        0,
        ge=0,
        description="SIDs that share the longest prefix with the chosen one, for a pair with fewer than "
        "max_rejected",
    )
    max_items: int = Field(20, ge=1, description="items of a pair's prompt, the newest kept")
    min_pairs: int = Field(100, ge=1, description="fewer pairs than this: no DPO model in this cycle")
    schemes: list[Scheme] = Field(
        ["purchased_over_shown", "clicked_over_shown"],
        description="kinds of pairs that are used; purchased_over_clicked lowers what users do click",
    )
    max_drop: float = Field(
        1.0, gt=0, description="stop when the chosen SID's log-probability fell so many nats"
    )
    probe_steps: int = Field(
        20,
        ge=1,
        description="steps between looks at the held-out users, which stop a model that collapses; a short "
        "stage has fewer between them",
    )
    probe_users: int = Field(500, ge=0, description="held-out users of such a look; 0: no look")
    # As the gate's margin for clicks: what users click next was logged under other answers, and falls a
    # little where they would click the new ones as well (docs/decisions/0010).
    max_recall_fall: float = Field(
        0.1,
        gt=0,
        le=1,
        description="stop when the held-out HR@10 fell by more than this share of it, and not by chance",
    )
    max_invalid_rise: float = Field(
        0.05,
        gt=0,
        le=1,
        description="stop when so much more of what is spelled freely is no SID, and not by chance",
    )
    max_seconds: float | None = Field(60.0, gt=0, description="time budget of the stage; empty: all pairs")


class ContextSettings(Section):
    """Scenes and attributes of profiles that the generator learns, in a model made from scratch."""

    min_count: int = Field(
        20,
        ge=1,
        description="users with an attribute's value, or clicks of a scene; rarer ones are not learned",
    )
    max_values: int = Field(64, ge=1, description="values of a field, the most frequent ones")
    max_fields: int = Field(8, ge=0, description="the scene and attributes, the most frequent ones; 0: none")
    dropout: float = Field(
        0.1, ge=0, lt=1, description="share of sequences without their context in a step of training"
    )


class OnlineRewardSettings(Section):
    """The online stage of Rewards-in-Context: a model learns from its own answers to what may be asked."""

    rounds: int = Field(0, ge=0, description="rounds after SFT; 0: none")
    requests: int = Field(3000, ge=1, description="requests of a round, drawn from the log's histories")
    temperature: float = Field(0.7, gt=0, description="of the softmax that an answer is drawn from")
    quantile: float = Field(
        0.7, ge=0, lt=1, description="an answer is kept where one of its rewards reaches this quantile of all"
    )
    floor: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="and where it is as likely as this quantile of what users went on to: no dear item that "
        "nobody would click",
    )
    steps: int = Field(150, ge=1, description="steps of a round, each beside a batch of the log's sequences")
    lr: float = Field(2e-4, gt=0, description="learning rate, constant")
    max_fall: float = Field(
        0.02, gt=0, le=1, description="relative fall of the held-out HR@10 with which the stage is undone"
    )


class RewardSettings(Section):
    """Rewards that requests may ask for, learned by a model made from scratch."""

    enabled: bool = Field(True, description="whether events are told with the rewards that they brought")
    bins: int = Field(8, ge=2, le=64, description="quantile bins of prices and of commissions")
    min_category: int = Field(
        50, ge=2, description="items of a category with a price, from which it has bins of its own"
    )
    min_share: float = Field(
        0.5, gt=0, le=1, description="share of items that must have a price (a commission) for its field"
    )
    min_count: int = Field(
        100, ge=1, description="events with each value of a field that is 0 or 1; fewer: no such field"
    )
    dropout: float = Field(0.15, ge=0, lt=1, description="share of events for which a field is left out")
    # At half of them a request without wishes lost 2 to 4 % of HR@10 (docs/decisions/0009).
    unconditioned: float = Field(
        0.75, ge=0, lt=1, description="share of events that are told without any rewards"
    )
    # Told as they are, they still reach what is answered with nothing asked for: where they are as many as
    # the log's own events, a model is vetoed for it.
    ignored_share: float = Field(
        0.1,
        ge=0,
        le=1,
        description="answers that were ignored, over the events that are learned in an epoch",
    )
    online: OnlineRewardSettings = Field(default_factory=lambda: OnlineRewardSettings.model_validate({}))


class OffPolicySettings(Section):
    """When explored answers veto a new model before it gets traffic."""

    min_ess: int = Field(1000, ge=1, description="fewer effective samples than this: no veto")
    margin: float = Field(
        0.1, gt=0, lt=1, description="relative fall of the logged click-through rate that is vetoed"
    )
    alpha: float = Field(0.05, gt=0, lt=0.5, description="error rate of the one-sided test")
    clip: float = Field(10.0, gt=0, description="largest weight in clipped IPS, shown beside the others")
    max_explorations: int = Field(10_000, ge=2, description="explorations of a window, the newest kept")


class LoraSettings(Section):
    """Low-rank tuning of a Hugging Face causal LM (Hu et al. 2021)."""

    rank: int = Field(16, ge=1, description="rank of the update")
    alpha: int = Field(32, ge=1, description="scale of the update, over the rank")
    dropout: float = Field(0.05, ge=0, lt=1, description="share of the update's inputs left out")
    lr: float = Field(2e-4, gt=0, description="learning rate")
    batch_tokens: int = Field(4096, ge=16, description="tokens a step")


class ScheduleSettings(Section):
    """When `sidstream trainer` runs a cycle."""

    every_minutes: float = Field(60.0, gt=0, description="from one start to the next")
    first_after_minutes: float = Field(
        0.0, ge=0, description="from the start of the process to the first cycle"
    )
    misfire_minutes: float = Field(30.0, gt=0, description="a start missed by more than this is dropped")
    min_events: int = Field(
        1, ge=1, description="fewer new clicks and purchases than this: the cycle is skipped"
    )


def _home() -> Path:
    return platformdirs.user_data_path("sidstream") / "trainer"


class TrainerSettings(Section):
    """How the generator is made and refreshed."""

    home: Path = Field(default_factory=_home, description="folder of the interaction log and of checkpoints")
    seed: int = Field(17, ge=0, description="of weights, order and dropout")
    threads: int | None = Field(None, ge=1, description="threads of torch; empty: one a physical core")
    arithmetic: Arithmetic = Field(
        "auto",
        description="type of the matrix products of training; auto: bfloat16 where the processor has "
        "instructions for it, else float32. A fixed one makes trainings on different processors comparable; "
        "bfloat16 without such instructions works, and is slow",
    )
    width: int = Field(128, ge=8, description="size of a state; a multiple of twice the heads")
    layers: int = Field(2, ge=1, le=24, description="layers of the backbone")
    heads: int = Field(4, ge=1, description="attention heads of a layer")
    ffn_factor: int = Field(2, ge=1, le=8, description="inner size of a feed-forward part over the width")
    depth_factor: int = Field(1, ge=1, le=8, description="inner size of a level's depth head over the width")
    members: int = Field(
        1,
        ge=1,
        le=8,
        description="generators made from scratch, each from its own seed, that become one as wide as all of "
        "them; they share `max_seconds`",
    )
    dropout: float = Field(0.1, ge=0, lt=1, description="share of activations left out in training")
    item_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of items without their own vector in a step, so that codes and text also stand "
        "alone, as they do for a new item",
    )
    smoothing: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of a target's weight that goes to other items, and to other codes below the same "
        "prefix",
    )
    item_vectors: bool = Field(
        True, description="whether an item has a vector of its own beside its codes and its text"
    )
    samples: Literal["position", "prefix"] = Field(
        "position",
        description="what is learned from a sequence: every position at once, or each prefix as a sample "
        "of its own, which costs more",
    )
    # In a shop of invoices the held-out lines are the first or last of one, and a strength fitted there loses
    # a fifth of HR@10 on all others: docs/decisions/0011.
    fit_strength: bool = Field(
        False,
        description="whether the weight of items of the past is fitted on held-out events; only where these "
        "are like all others",
    )
    text_inputs: bool = Field(True, description="whether the generator sees the embedding of an item's text")
    max_words: int = Field(512, ge=0, description="words of titles in the vocabulary, the most frequent ones")
    title_words: int = Field(12, ge=1, description="words of a title that are learned")
    max_items: int = Field(50, ge=1, le=1000, description="items of a prompt, the newest kept")
    min_history: int = Field(2, ge=1, description="users with fewer interactions are left out")
    lr: float = Field(4e-3, gt=0, description="peak learning rate of SFT")
    refresh_lr: float = Field(
        5e-4, gt=0, description="peak learning rate of SFT that goes on from a champion"
    )
    weight_decay: float = Field(0.01, ge=0, description="decoupled, as in AdamW")
    epochs: int = Field(10, ge=1, description="passes over the log's sequences, at most")
    max_seconds: float | None = Field(75.0, gt=0, description="time budget of SFT; empty: all epochs")
    max_steps: int | None = Field(
        None, ge=1, description="steps of one training, the same work on any machine; empty: no limit"
    )
    patience: int = Field(3, ge=1, description="validations without a better NDCG@10 before SFT stops")
    batch_positions: int = Field(512, ge=8, description="items a step, padding included")
    # docs/decisions/0016-one-hold-out.md: what a share costs, and what it can show.
    validation_share: float = Field(
        0.1,
        ge=0,
        lt=0.5,
        description="share of users, dealt by a hash, of whom nothing is ever learned: they judge models. "
        "More than the champion left out takes a codebook and a model from scratch; 0: nobody judges",
    )
    validation_users: int = Field(
        1000, ge=0, description="validation users of whom an event is scored at each look, at most"
    )
    replay: float = Field(0.3, ge=0, lt=1, description="share of older sequences in a refresh")
    pretrain: PretrainSettings = Field(default_factory=lambda: PretrainSettings.model_validate({}))
    weights: TaskWeights = Field(default_factory=lambda: TaskWeights.model_validate({}))
    tasks: TaskSettings = Field(default_factory=lambda: TaskSettings.model_validate({}))
    context: ContextSettings = Field(default_factory=lambda: ContextSettings.model_validate({}))
    rewards: RewardSettings = Field(default_factory=lambda: RewardSettings.model_validate({}))
    dpo: DpoSettings = Field(default_factory=lambda: DpoSettings.model_validate({}))
    offpolicy: OffPolicySettings = Field(default_factory=lambda: OffPolicySettings.model_validate({}))
    schedule: ScheduleSettings = Field(default_factory=lambda: ScheduleSettings.model_validate({}))
    # Without a constraint, published generators spell 17 to 27 % of SIDs that no item has; a minute of
    # training on a slow machine gave 13 %. Serving spells real ones only: this finds what learned nothing.
    min_validity: float = Field(
        0.7, ge=0, le=1, description="share of unconstrained answers that are real SIDs"
    )
    max_fall: float = Field(
        0.2, ge=0, lt=1, description="relative fall of HR@10 against the parent that fails"
    )
    beat_popularity: bool = Field(True, description="refuse a first model that ranks worse than popularity")
    hf_model: str | None = Field(None, description="a Hugging Face causal LM (id or folder) to tune instead")
    lora: LoraSettings = Field(default_factory=lambda: LoraSettings.model_validate({}))
