"""Explored answers in the tiny shop: drawn from a model's best by chance, clicked where they are right."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from registry.bundles.prompt import Prompt
from streams.events import Exploration
from tests.tiny_shop import ITEMS, sid_of
from trainer.generator.constrained import SidSet, beam_search
from trainer.generator.model import GeneratorForCausalLM

T0 = 1_600_000_000_000


@torch.no_grad()
def explore(
    model: GeneratorForCausalLM, prompt: Prompt, count: int, *, users: int = 200, candidates: int = 6,
    temperature: float = 3.0, since: int = T0, codebook: str = "c" * 16, seed: int = 0,
) -> list[tuple[Exploration, bool]]:  # fmt: skip
    """`count` explorations, and if they were clicked, in a shop where item n + 1 follows item n.

    A shopper clicks that item in 80 % of the cases, another one in 5 %. One millisecond lies between two.
    """
    random = np.random.default_rng(seed)
    named = {sid_of(item): item for item in range(ITEMS)}
    sids = SidSet(list(named), prompt)
    starts, lengths = random.integers(0, ITEMS, count), random.integers(1, 5, count)
    explorations: list[tuple[Exploration, bool]] = []
    # One encoding for all: a walk is known by its start and its length.
    answers: dict[tuple[int, int], tuple[list[list[int]], list[float]]] = {}
    for at, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        walk = [sid_of((start + step) % ITEMS) for step in range(length)]
        if (start, length) not in answers:
            codes = torch.tensor([[prompt.tokens(sid) for sid in walk]])
            best, scores = beam_search(model, model.encode(codes, torch.tensor([length])), sids, candidates)
            answers[start, length] = best[0].tolist(), scores[0].double().tolist()
        best_codes, log_probs = answers[start, length]
        raised = np.exp((np.array(log_probs) - max(log_probs)) / temperature)
        chances = raised / raised.sum()
        chosen = int(random.choice(len(chances), p=chances))
        item = named[tuple(best_codes[chosen])]
        clicked = bool(random.random() < (0.8 if item == (start + length) % ITEMS else 0.05))
        event = exploration(
            at, ts=since + at, user_id=f"u{int(random.integers(users))}", item_id=f"i{item:02}",
            chosen=chosen, propensity=float(chances[chosen]), candidates=best_codes, scores=log_probs,
            temperature=temperature, prompt=[list(sid) for sid in walk], codebook=codebook,
        )  # fmt: skip
        explorations.append((event, clicked))
    return explorations


def explore_evenly(
    count: int, *, candidates: int = 8, since: int = T0, codebook: str = "c" * 16, seed: int = 0
) -> list[tuple[Exploration, bool]]:
    """`count` explorations after one item n, each of a user of its own, and if they were clicked.

    Items n + 1, n + 5 and others by chance are candidates in any order, each as likely to be drawn; no model
    draws them. A shopper clicks item n + 1 and nothing else. One millisecond lies between two.
    """
    random = np.random.default_rng(seed)
    explorations: list[tuple[Exploration, bool]] = []
    for at in range(count):
        item = int(random.integers(ITEMS))
        others = random.permutation(np.setdiff1d(np.arange(ITEMS), (1, 5)))[: candidates - 2]
        shown = (item + random.permutation([1, 5, *others])) % ITEMS
        chosen = int(random.integers(candidates))
        event = exploration(
            at, ts=since + at, user_id=f"e{at}", item_id=f"i{shown[chosen]:02}", chosen=chosen,
            propensity=1 / candidates, candidates=[list(sid_of(int(one))) for one in shown],
            scores=[-1.0] * candidates, temperature=1.0, prompt=[list(sid_of(item))], codebook=codebook,
        )  # fmt: skip
        explorations.append((event, bool(shown[chosen] == (item + 1) % ITEMS)))
    return explorations


def exploration(number: int, **fields: Any) -> Exploration:
    """One exploration of user u, of two candidates in the tiny shop."""
    defaults: dict[str, Any] = {
        "event_id": f"e{number}", "request_id": f"r{number}", "ts": T0, "user_id": "u", "item_id": "i00",
        "propensity": 0.5, "chosen": 0, "candidates": [list(sid_of(0)), list(sid_of(1))],
        "scores": [-1.0, -1.0], "temperature": 1.0, "prompt": [list(sid_of(2))], "codebook": "c" * 16,
        "bundle": "b", "arm": "champion", "trial": "t",
    }  # fmt: skip
    return Exploration.new(**defaults | fields)
