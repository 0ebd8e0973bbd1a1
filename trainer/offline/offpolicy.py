"""Off-policy check: what the explorations say of a new model before it gets traffic. It can only veto.

Serving draws the first place of some answers by chance, and logs candidates and chances. A new model's
softmax over the same candidates gives each drawn item another chance, and the quotient reweights its click.
What it would show beyond the candidates is not judged. The window's clicks were also trained on, so the
estimates lean towards the new model: fit to refuse one, not to praise one.
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
from streams.state.keys import hashed
from trainer.generator.model import GeneratorForCausalLM
from trainer.offline.ranking import sid_scores
from trainer.sequences.batches import Int32, Int64, context_tensor, pad_items
from trainer.settings import OffPolicySettings

# Candidates of one forward: their logits over the vocabulary stay near the cache.
_CANDIDATES = 2048
# A draw less likely than this does not happen; its quotient would be all that counts.
_LEAST = 1e-9
# Below this log-probability nothing more is told about an item.
_FLOOR = -50.0
_RIDGE = 1.0


@dataclass(frozen=True)
class Explored:
    """N explorations as arrays; their M candidates, of L levels, lie one after the other."""

    prompts: list[Int64]  # N of (P, L) token ids, oldest item first
    contexts: Int32  # (N, C) token ids, 0 where nothing was said
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


def explored(
    found: Sequence[tuple[Exploration, bool]], codebook: str, prompt: Prompt, settings: OffPolicySettings,
    context: Context | None = None,
) -> Explored | None:  # fmt: skip
    """The newest `max_explorations` with whether the drawn item was clicked; None where there are none.

    Those of another codebook, and those that break their own contract, are left out and counted. `context`
    has the tokens of what was said.
    """
    if not found:
        return None
    newest = sorted(found, key=lambda one: (one[0].ts, one[0].request_id))[-settings.max_explorations :]
    left_out: Counter[str] = Counter()
    kept: list[tuple[Exploration, bool]] = []
    shown: list[Int64] = []
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
            or event.propensity < _LEAST
        ):
            left_out["that contradict themselves"] += 1
            continue
        kept.append((event, clicked))
        shown.append(history)
        codes += candidates
    starts = np.cumsum([0, *(len(event.candidates) for event, _ in kept)], dtype=np.int64)
    scores = np.array([score for event, _ in kept for score in event.scores], dtype=np.float64)
    places = np.array([place for event, _ in kept for place in range(len(event.scores))], dtype=np.float64)
    known = context or Context()
    said = [known.row(event.context) for event, _ in kept]
    return Explored(
        prompts=shown,
        contexts=np.array(said, dtype=np.int32).reshape(len(kept), len(known.fields)),
        starts=starts,
        codes=np.array(codes, dtype=np.int64).reshape(-1, len(prompt.sizes)),
        features=np.stack([np.clip(scores, _FLOOR, 0.0), np.log1p(places)], axis=1),
        temperature=np.array([event.temperature for event, _ in kept], dtype=np.float64),
        drawn=starts[:-1] + np.array([event.chosen for event, _ in kept], dtype=np.int64),
        propensity=np.array([event.propensity for event, _ in kept], dtype=np.float64),
        reward=np.array([clicked for _, clicked in kept], dtype=np.float64),
        users=np.array([hashed(event.user_id) for event, _ in kept], dtype=np.str_),
        left_out=dict(left_out),
    )


def _tokens(sids: Sequence[Sequence[int]], prompt: Prompt) -> Int64:
    rows = [prompt.tokens(sid) for sid in sids]
    return np.array(rows, dtype=np.int64).reshape(len(rows), len(prompt.sizes))


@torch.no_grad()
def scores(model: GeneratorForCausalLM, logged: Explored, weight: float = 0.0) -> Floats:
    """The score of every candidate (M,) under its own prompt, by the model in its own precision.

    (1 - weight) times the log-probability of its SID, plus weight times its product with the dense head,
    which is its log-probability there up to one constant a prompt.
    """
    model.eval()
    where = next(model.parameters()).device
    made = np.zeros(len(logged.codes))
    counts = np.diff(logged.starts)
    step = max(1, _CANDIDATES // int(counts.max(initial=1)))
    for low in range(0, len(logged), step):
        high = min(low + step, len(logged))
        rows = slice(int(logged.starts[low]), int(logged.starts[high]))
        prompts = logged.prompts[low:high]
        # pad_items takes rows of a table of codes: here the table is the prompts themselves.
        ends = np.cumsum([0, *(len(prompt) for prompt in prompts)])
        places = [np.arange(begin, end) for begin, end in pairwise(ends)]
        items, lengths = pad_items(places, np.concatenate(prompts))
        context = context_tensor(logged.contexts, low, high, where)
        state = model.encode(items.to(where), lengths.to(where), context=context)
        codes = torch.from_numpy(logged.codes[rows]).to(where)
        owner = torch.from_numpy(np.repeat(np.arange(high - low), counts[low:high])).to(where)
        total = sid_scores(model, state, owner, codes)
        if weight > 0:
            vectors = model.model.embed_items(codes)
            query = model.model.queries(state)
            logits = (query[owner] * vectors).sum(-1)
            batch, past, more = model.model.again(
                query, model.model.items.rows(items.to(where)), lengths.to(where)
            )
            same = (owner[:, None] == batch) & (model.model.items.rows(codes)[:, None] == past)
            total = (1 - weight) * total + weight * (logits + (same * more).sum(-1))
        made[rows] = total.double().cpu().numpy()
    return made


def target_policy(scored: Floats, logged: Explored) -> Floats:
    """softmax(scored / temperature) over each exploration's candidates: (M,) -> (M,)."""
    counts = np.diff(logged.starts)
    top = np.maximum.reduceat(scored, logged.starts[:-1])
    # The best is taken off first: a small temperature then makes zeros, and never a quotient of infinities.
    raised = np.exp((scored - np.repeat(top, counts)) / np.repeat(logged.temperature, counts))
    normaliser = np.add.reduceat(raised, logged.starts[:-1])
    policy: Floats = raised / np.repeat(normaliser, counts)
    return policy


def reward_model(logged: Explored) -> Floats:
    """Expected reward (M,) of every candidate: a ridge regression, fitted on the other half of the users.

    Two folds by the hash of the user: a row's own reward never enters its own expectation, so the doubly
    robust estimate stays unbiased (cross-fitting, Chernozhukov et al. 2018). Without rows to learn from, 0,
    which makes it plain IPS.
    """
    fold = np.array([int(user, 16) & 1 for user in logged.users], dtype=np.int64)
    of_candidate = np.repeat(fold, np.diff(logged.starts))
    made = np.zeros(len(logged.codes))
    for part in (0, 1):
        learn = fold != part
        if not learn.any():
            continue
        seen, reward = logged.features[logged.drawn[learn]], logged.reward[learn]
        center, scale = seen.mean(0), np.maximum(seen.std(0), 1e-9)
        x, level = (seen - center) / scale, reward.mean()
        slope = np.linalg.solve(x.T @ x + _RIDGE * np.eye(x.shape[1]), x.T @ (reward - level))
        ask = of_candidate == part
        made[ask] = np.clip(level + (logged.features[ask] - center) / scale @ slope, 0.0, 1.0)
    return made


@dataclass(frozen=True)
class Value:
    """An estimate with its 1 - 2 alpha interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class OffPolicy:
    """What the explorations say of one model. Values are clicks per exploration; None: too few users."""

    n: int
    users: int
    left_out: dict[str, int]
    ess: float
    logged: Value | None  # of the policy that drew them: its own mean reward
    ips: Value | None
    clipped_ips: Value | None
    snips: Value | None
    dr: Value | None
    vetoed: bool
    sentence: str

    def metrics(self) -> dict[str, float]:
        """Figures for the registry, by name."""
        made = {"ope_n": float(self.n), "ope_users": float(self.users), "ope_ess": self.ess}
        made["ope_left_out"] = float(sum(self.left_out.values()))
        for name in ("logged", "ips", "clipped_ips", "snips", "dr"):
            value: Value | None = getattr(self, name)
            if value is not None:
                made |= {f"ope_{name}": value.value, f"ope_{name}_low": value.low}
                made[f"ope_{name}_high"] = value.high
        return made

    def told(self) -> str:
        """One line: how much there was, all estimates side by side, and the sentence."""
        shown = [
            f"{name} {value.value:.4f}"
            for name, value in (
                ("logged", self.logged), ("IPS", self.ips), ("clipped", self.clipped_ips),
                ("SNIPS", self.snips), ("DR", self.dr),
            )
            if value is not None
        ]  # fmt: skip
        out = [f"{count:,} {reason} left out" for reason, count in self.left_out.items()]
        return "; ".join(
            [", ".join([f"{self.n:,} explorations of {self.users:,} users", *out, *shown]), self.sentence]
        )


def judge(
    model: GeneratorForCausalLM, logged: Explored, settings: OffPolicySettings, weight: float = 0.0
) -> OffPolicy:
    """Hold a model against the explorations; `weight` is the dense head's in its score.

    Veto: enough effective samples, and the doubly robust value is shown (one-sided `alpha`, clustered by
    user) to be below (1 - margin) of the value that was logged. Anything else is no veto.
    """
    users = len(set(logged.users.tolist()))
    nothing = OffPolicy(
        len(logged), users, logged.left_out, 0.0, None, None, None, None, None, False,
        f"no veto: explorations of {users} users, and it takes two",
    )  # fmt: skip
    if users < 2:
        return nothing
    policy = target_policy(scores(model, logged, weight), logged)
    w, r = policy[logged.drawn] / logged.propensity, logged.reward
    q = reward_model(logged)
    q_chosen, q_pi = q[logged.drawn], np.add.reduceat(policy * q, logged.starts[:-1])
    dr = _value(offpolicy.doubly_robust(w, r, q_chosen, q_pi, logged.users), settings.alpha)
    own = _value(offpolicy.mean(r, logged.users), settings.alpha)
    factor = 1.0 - settings.margin
    below = _value(
        offpolicy.doubly_robust_contrast(w, r, q_chosen, q_pi, logged.users, factor), settings.alpha
    )
    ess = offpolicy.effective_sample_size(w)
    vetoed = ess >= settings.min_ess and below is not None and below.high < 0
    return OffPolicy(
        n=len(logged),
        users=users,
        left_out=logged.left_out,
        ess=ess,
        logged=own,
        ips=_value(offpolicy.ips(w, r, logged.users), settings.alpha),
        clipped_ips=_value(offpolicy.clipped_ips(w, r, logged.users, settings.clip), settings.alpha),
        snips=_value(offpolicy.snips(w, r, logged.users), settings.alpha),
        dr=dr,
        vetoed=vetoed,
        sentence=_sentence(vetoed, ess, dr, own, settings),
    )


def _value(estimate: Estimate | None, alpha: float) -> Value | None:
    return None if estimate is None else Value(estimate.value, *offpolicy.interval(estimate, alpha))


def _sentence(
    vetoed: bool, ess: float, dr: Value | None, own: Value | None, settings: OffPolicySettings
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
