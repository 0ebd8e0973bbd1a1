"""The decision record: One4All applied twice, with everything that is needed to compute it again.

First the aligned model against the fine-tuned one it came from; whichever goes on is then held against the
champion. The order is fixed beforehand. Both comparisons read the same three-arm trial.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict
from typing import Any

from registry.gate import Comparison, Verdict, compare
from registry.settings import GateSettings
from registry.statistics import Sums
from streams.errors import SidstreamError
from streams.events import Arm

FORMAT = 1
CHAMPION, SFT, DPO = "champion", "challenger-sft", "challenger-dpo"


def judge(
    arms: dict[str, Sums], settings: GateSettings, mode: str
) -> tuple[list[Comparison], Verdict, str, str]:
    """The comparisons in order, the verdict, the winner's arm and one sentence.

    The aligned model goes on only where it is promoted over the fine-tuned one; without an aligned arm there
    is one comparison. The verdict is that of the last one.
    """
    comparisons = []
    candidate = SFT
    if DPO in arms:
        first = compare(DPO, SFT, arms, settings, mode)
        comparisons.append(first)
        candidate = DPO if first.verdict == "promote" else SFT
    last = compare(candidate, CHAMPION, arms, settings, mode)
    comparisons.append(last)
    winner = candidate if last.verdict == "promote" else CHAMPION
    label = "" if mode == "test" else f" (mode {mode})"
    said = {
        "promote": f"promote {candidate}{label}",
        "reject": f"reject {candidate}{label}",
        "inconclusive": f"inconclusive on {candidate}{label}, the champion stays",
    }[last.verdict]
    return comparisons, last.verdict, winner, f"{said}: {last.sentence.partition('; ')[2]}"


def decide(
    trial: str,
    arms: list[Arm],
    sums: dict[str, Sums],
    settings: GateSettings,
    mode: str | None = None,
    ts: int | None = None,
) -> dict[str, Any]:
    """The record of a decision about a trial, JSON-able. `ts` is in milliseconds (default: now).

    `decision` is a hash of what was decided on: the same sums under the same rule are the same decision.
    Raises SidstreamError when the arms are no trial.
    """
    names = {arm.name for arm in arms}
    if not {CHAMPION, SFT} <= names:
        raise SidstreamError(
            f"trial {trial} has the arms {', '.join(sorted(names))}: nothing is on trial; start one first"
        )
    mode = mode or settings.mode
    inputs = {
        arm.name: asdict(sums.get(arm.name, Sums())) for arm in arms if arm.name in (CHAMPION, SFT, DPO)
    }
    record: dict[str, Any] = {
        "format": FORMAT,
        "trial": trial,
        "mode": mode,
        "settings": settings.model_dump(exclude={"mode"}),
        "arms": {
            arm.name: {"bundle": arm.bundle, "version": arm.version, "weight": arm.weight} for arm in arms
        },
        "inputs": inputs,
    }
    record["decision"] = _hash(record)
    comparisons, verdict, winner, sentence = judge(_sums(record), settings, mode)
    return record | {
        "comparisons": [comparison.as_dict() for comparison in comparisons],
        "verdict": verdict,
        "winner": winner,
        "sentence": sentence,
        "ts": time.time_ns() // 1_000_000 if ts is None else ts,
    }


def recompute(record: dict[str, Any]) -> tuple[Verdict, str]:
    """The verdict and the winner's arm that follow from a record's own sums and settings.

    Raises SidstreamError when the record was changed (its inputs are not those that it is named by).
    """
    try:
        named = {key: record[key] for key in ("format", "trial", "mode", "settings", "arms", "inputs")}
        if record["format"] != FORMAT:
            raise SidstreamError(
                f"the decision has format {record['format']}; this version of sidstream reads {FORMAT}"
            )
        if _hash(named) != record["decision"]:
            raise SidstreamError(
                f"decision {record['decision']} was changed: its inputs are those of {_hash(named)}"
            )
        return judge(_sums(record), GateSettings(**record["settings"]), record["mode"])[1:3]
    except (KeyError, TypeError, ValueError) as error:
        raise SidstreamError(f"the decision record is incomplete ({error})") from error


def _sums(record: dict[str, Any]) -> dict[str, Sums]:
    return {name: Sums(**fields) for name, fields in record["inputs"].items()}


def _hash(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]
