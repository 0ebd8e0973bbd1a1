"""Off-policy check: a new model's value by logged explorations, before it gets traffic. It can only veto.

Serving draws the first place of some answers by chance, and logs the candidates and their probabilities. A
new model's softmax over the same candidates gives each drawn item another probability, and the quotient of
both weights its click. Items that only the new model would show are not judged. In the update cycle the
explorations are those of validation users, whom no model has learned from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from registry.bundles.context import Context
from registry.bundles.prompt import Prompt
from registry.experiment import offpolicy
from registry.experiment.offpolicy import Floats
from registry.experiment.statistics import Estimate
from streams.errors import SidstreamError
from streams.events import Exploration
from streams.state.keys import anonymous_user
from trainer.generator.model import GeneratorForCausalLM
from trainer.offline_checks.ranking import sid_scores
from trainer.sequences.batches import Int32, Int64, context_tensor, pad_items
from trainer.settings import OffPolicySettings

# Candidates of one forward pass: so many rows of logits over the vocabulary fit a core's cache.
_CANDIDATES_PER_FORWARD = 2048
# An exploration with a smaller propensity contradicts itself; its weight would dominate every estimate.
_MIN_PROPENSITY = 1e-9
# Log-probabilities are clipped here: below it they carry no information about an item.
_MIN_LOG_PROBABILITY = -50.0
_RIDGE = 1.0


@dataclass(frozen=True)
class LoggedExplorations:
    """N explorations as arrays; their M candidates, of L levels, lie one after the other."""

    prompts: list[Int64]  # N of (P, L) token ids, oldest item first
    contexts: Int32  # (N, C) token ids, 0 where a field has no value
    starts: Int64  # (N + 1,) first candidate of each
    codes: Int64  # (M, L) token ids
    features: Floats  # (M, 2) log-probability under the bundle that answered, log of the place
    temperature: Floats  # (N,)
    drawn: Int64  # (N,) the drawn candidate, among all M
    propensity: Floats  # (N,)
    reward: Floats  # (N,) 1 where the drawn item was clicked
    users: npt.NDArray[np.str_]  # (N,) hashed
    left_out: dict[str, int]  # reason -> explorations

    def __len__(self) -> int:
        return len(self.prompts)


def logged_explorations(
    explorations: Sequence[tuple[Exploration, bool]], codebook: str, prompt: Prompt,
    settings: OffPolicySettings, context: Context | None = None,
) -> LoggedExplorations | None:  # fmt: skip
    """The newest `max_explorations` of (exploration, whether its drawn item was clicked); None for none.

    Explorations of another codebook, and those that contradict themselves, are left out and counted.
    `context` has the tokens of the explorations' context fields.
    """
    if not explorations:
        return None
    newest = sorted(explorations, key=lambda pair: (pair[0].ts, pair[0].request_id))[
        -settings.max_explorations :
    ]
    left_out: Counter[str] = Counter()
    usable: list[tuple[Exploration, bool]] = []
    prompts: list[Int64] = []
    codes: list[list[int]] = []
    for event, clicked in newest:
        if event.codebook != codebook:
            left_out["of another codebook"] += 1
            continue
        try:
            history = _tokens(event.prompt[-prompt.max_items :], prompt)
            candidates = [prompt.tokens(sid) for sid in event.candidates]
        except SidstreamError:
            left_out["with a SID that the codebook does not have"] += 1
            continue
        if (
            len(event.scores) != len(candidates)
            or event.chosen >= len(candidates)
            or event.propensity < _MIN_PROPENSITY
        ):
            left_out["that contradict themselves"] += 1
            continue
        usable.append((event, clicked))
        prompts.append(history)
        codes += candidates
    starts = np.cumsum([0, *(len(event.candidates) for event, _ in usable)], dtype=np.int64)
    scores = np.array([score for event, _ in usable for score in event.scores], dtype=np.float64)
    places = np.array([place for event, _ in usable for place in range(len(event.scores))], dtype=np.float64)
    context_fields = context or Context()
    context_rows = [context_fields.row(event.context) for event, _ in usable]
    return LoggedExplorations(
        prompts=prompts,
        contexts=np.array(context_rows, dtype=np.int32).reshape(len(usable), len(context_fields.fields)),
        starts=starts,
        codes=np.array(codes, dtype=np.int64).reshape(-1, len(prompt.sizes)),
        features=np.stack([np.clip(scores, _MIN_LOG_PROBABILITY, 0.0), np.log1p(places)], axis=1),
        temperature=np.array([event.temperature for event, _ in usable], dtype=np.float64),
        drawn=starts[:-1] + np.array([event.chosen for event, _ in usable], dtype=np.int64),
        propensity=np.array([event.propensity for event, _ in usable], dtype=np.float64),
        reward=np.array([clicked for _, clicked in usable], dtype=np.float64),
        users=np.array([anonymous_user(event.user_id) for event, _ in usable], dtype=np.str_),
        left_out=dict(left_out),
    )


def _tokens(sids: Sequence[Sequence[int]], prompt: Prompt) -> Int64:
    rows = [prompt.tokens(sid) for sid in sids]
    return np.array(rows, dtype=np.int64).reshape(len(rows), len(prompt.sizes))


@torch.no_grad()
def candidate_scores(model: GeneratorForCausalLM, logged: LoggedExplorations, weight: float = 0.0) -> Floats:
    """The score of every candidate (M,) under its own prompt, by the model in its own precision.

    (1 - weight) times the log-probability of its SID, plus weight times its product with the dense head,
    which is its log-probability there up to one constant a prompt.
    """
    model.eval()
    device = next(model.parameters()).device
    scores = np.zeros(len(logged.codes))
    counts = np.diff(logged.starts)
    rows_per_forward = max(1, _CANDIDATES_PER_FORWARD // int(counts.max(initial=1)))
    for low in range(0, len(logged), rows_per_forward):
        high = min(low + rows_per_forward, len(logged))
        rows = slice(int(logged.starts[low]), int(logged.starts[high]))
        prompts = logged.prompts[low:high]
        # pad_items takes rows of a table of codes: here the table is the prompts themselves.
        ends = np.cumsum([0, *(len(prompt) for prompt in prompts)])
        places = [np.arange(begin, end) for begin, end in pairwise(ends)]
        items, lengths = pad_items(places, np.concatenate(prompts))
        context = context_tensor(logged.contexts, low, high, device)
        state = model.encode(items.to(device), lengths.to(device), context=context)
        codes = torch.from_numpy(logged.codes[rows]).to(device)
        owner = torch.from_numpy(np.repeat(np.arange(high - low), counts[low:high])).to(device)
        total = sid_scores(model, state, owner, codes)
        if weight > 0:
            vectors = model.model.embed_items(codes)
            query = model.model.queries(state)
            logits = (query[owner] * vectors).sum(-1)
            batch, history_items, bias = model.model.repeat_bias(
                query, model.model.items.rows(items.to(device)), lengths.to(device)
            )
            same = (owner[:, None] == batch) & (model.model.items.rows(codes)[:, None] == history_items)
            total = (1 - weight) * total + weight * (logits + (same * bias).sum(-1))
        scores[rows] = total.double().cpu().numpy()
    return scores


def target_policy(scored: Floats, logged: LoggedExplorations) -> Floats:
    """softmax(scored / temperature) over each exploration's candidates: (M,) -> (M,)."""
    counts = np.diff(logged.starts)
    top = np.maximum.reduceat(scored, logged.starts[:-1])
    # The largest score is subtracted first, so that a small temperature gives zeros and not infinities.
    raised = np.exp((scored - np.repeat(top, counts)) / np.repeat(logged.temperature, counts))
    normaliser = np.add.reduceat(raised, logged.starts[:-1])
    policy: Floats = raised / np.repeat(normaliser, counts)
    return policy


def reward_model(logged: LoggedExplorations) -> Floats:
    """Expected reward (M,) of every candidate: a ridge regression, fitted on the other half of the users.

    Two folds by the hash of the user: a row's own reward never enters its own expectation, so the doubly
    robust estimate stays unbiased (cross-fitting, Chernozhukov et al. 2018). Without rows to learn from, 0,
    which makes it plain IPS.
    """
    fold = np.array([int(user, 16) & 1 for user in logged.users], dtype=np.int64)
    of_candidate = np.repeat(fold, np.diff(logged.starts))
    expected = np.zeros(len(logged.codes))
    for part in (0, 1):
        fitted = fold != part
        if not fitted.any():
            continue
        features, reward = logged.features[logged.drawn[fitted]], logged.reward[fitted]
        center, scale = features.mean(0), np.maximum(features.std(0), 1e-9)
        x, level = (features - center) / scale, reward.mean()
        slope = np.linalg.solve(x.T @ x + _RIDGE * np.eye(x.shape[1]), x.T @ (reward - level))
        predicted = of_candidate == part
        expected[predicted] = np.clip(level + (logged.features[predicted] - center) / scale @ slope, 0.0, 1.0)
    return expected


@dataclass(frozen=True)
class IntervalEstimate:
    """An estimate with its 1 - 2 alpha interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class OffPolicyVerdict:
    """The estimates for one model, in clicks per exploration; None for too few users."""

    n: int
    users: int
    left_out: dict[str, int]
    ess: float
    logged: IntervalEstimate | None  # of the policy that drew them: its own mean reward
    ips: IntervalEstimate | None
    clipped_ips: IntervalEstimate | None
    snips: IntervalEstimate | None
    dr: IntervalEstimate | None
    vetoed: bool
    sentence: str

    def metrics(self) -> dict[str, float]:
        """Figures for the registry, by name."""
        figures = {"ope_n": float(self.n), "ope_users": float(self.users), "ope_ess": self.ess}
        figures["ope_left_out"] = float(sum(self.left_out.values()))
        for name in ("logged", "ips", "clipped_ips", "snips", "dr"):
            value: IntervalEstimate | None = getattr(self, name)
            if value is not None:
                figures |= {f"ope_{name}": value.value, f"ope_{name}_low": value.low}
                figures[f"ope_{name}_high"] = value.high
        return figures

    def summary(self) -> str:
        """One line: the counts, all estimates side by side, and the sentence."""
        estimates = [
            f"{name} {value.value:.4f}"
            for name, value in (
                ("logged", self.logged), ("IPS", self.ips), ("clipped", self.clipped_ips),
                ("SNIPS", self.snips), ("DR", self.dr),
            )
            if value is not None
        ]  # fmt: skip
        omitted = [f"{count:,} {reason} left out" for reason, count in self.left_out.items()]
        return "; ".join(
            [
                ", ".join([f"{self.n:,} explorations of {self.users:,} users", *omitted, *estimates]),
                self.sentence,
            ]
        )


def judge_by_explorations(
    model: GeneratorForCausalLM, logged: LoggedExplorations, settings: OffPolicySettings, weight: float = 0.0
) -> OffPolicyVerdict:
    """Judge a model by the explorations, as `judge_policy`; `weight` is the dense head's in its score."""
    return judge_policy(target_policy(candidate_scores(model, logged, weight), logged), logged, settings)


def judge_policy(policy: Floats, logged: LoggedExplorations, settings: OffPolicySettings) -> OffPolicyVerdict:
    """Judge the probabilities (M,) with which a model would draw the candidates of N explorations.

    It is vetoed where there are enough effective samples and the doubly robust value is significantly
    (one-sided `alpha`, clustered by user) below (1 - margin) of the logged policy's value.
    """
    users = len(set(logged.users.tolist()))
    nothing = OffPolicyVerdict(
        len(logged), users, logged.left_out, 0.0, None, None, None, None, None, False,
        f"no veto: explorations of {users} users, and it takes two",
    )  # fmt: skip
    if users < 2:
        return nothing
    w, r = policy[logged.drawn] / logged.propensity, logged.reward
    q = reward_model(logged)
    q_chosen, q_pi = q[logged.drawn], np.add.reduceat(policy * q, logged.starts[:-1])
    dr = _interval_estimate(offpolicy.doubly_robust(w, r, q_chosen, q_pi, logged.users), settings.alpha)
    own = _interval_estimate(offpolicy.mean(r, logged.users), settings.alpha)
    factor = 1.0 - settings.margin
    below = _interval_estimate(
        offpolicy.doubly_robust_contrast(w, r, q_chosen, q_pi, logged.users, factor), settings.alpha
    )
    ess = offpolicy.effective_sample_size(w)
    vetoed = ess >= settings.min_ess and below is not None and below.high < 0
    return OffPolicyVerdict(
        n=len(logged),
        users=users,
        left_out=logged.left_out,
        ess=ess,
        logged=own,
        ips=_interval_estimate(offpolicy.ips(w, r, logged.users), settings.alpha),
        clipped_ips=_interval_estimate(
            offpolicy.clipped_ips(w, r, logged.users, settings.clip), settings.alpha
        ),
        snips=_interval_estimate(offpolicy.snips(w, r, logged.users), settings.alpha),
        dr=dr,
        vetoed=vetoed,
        sentence=_sentence(vetoed, ess, dr, own, settings),
    )


def _interval_estimate(estimate: Estimate | None, alpha: float) -> IntervalEstimate | None:
    return (
        None if estimate is None else IntervalEstimate(estimate.value, *offpolicy.interval(estimate, alpha))
    )


def _sentence(
    vetoed: bool,
    ess: float,
    dr: IntervalEstimate | None,
    own: IntervalEstimate | None,
    settings: OffPolicySettings,
) -> str:
    if ess < settings.min_ess or dr is None or own is None:
        return f"no veto: {ess:,.0f} effective samples of the {settings.min_ess:,} that it takes"
    about = f"CTR {dr.value:.4f} ({dr.low:.4f} to {dr.high:.4f}, doubly robust)"
    against = f"{settings.margin:.0%} below the logged {own.value:.4f}"
    if not vetoed:
        return f"no veto: {about} is not shown to be more than {against}"
    return (
        f"veto: {about} on {ess:,.0f} effective samples of explored answers is more than {against} "
        "(SIDSTREAM_TRAINER__OFFPOLICY__MARGIN)"
    )
