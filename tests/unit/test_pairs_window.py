"""New pairs of a window are held against the whole log, and a cycle tells what was withdrawn."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from registry.context import Context
from registry.prompt import Prompt
from tests.tiny_log import Logged
from tests.unit.test_pair_filter import W, pair
from trainer import cycle
from trainer.settings import TrainerSettings


def test_a_window_withdraws_new_pairs_by_the_whole_log(tmp_path: Path) -> None:
    logged = Logged(tmp_path)
    logged.purchases(("u", "b", 5))
    logged.clicks(("r", "u", "c", 7))
    logged.events(pair("b", name="old"))
    logged.window()
    logged.events(pair("bd", name="new"), pair("c", scheme="clicked_over_shown", request="r", name="gone"))
    found = logged.window().pairs(W)
    assert {one.event_id: one.rejected_items for one in found.pairs} == {"new": ["d"]}
    assert (found.bought, found.clicked, found.gone) == (1, 1, 1)


def test_a_cycle_tells_what_was_withdrawn_and_does_not_count_it(tmp_path: Path) -> None:
    logged = Logged(tmp_path)
    logged.purchases(("u", "b", 5))
    logged.events(pair("b", name="gone"), pair("d", name="kept"))
    material: Any = SimpleNamespace(
        window=logged.window(), codebook=SimpleNamespace(id="book"), prompt=Prompt((2, 2), 4),
        context=Context(), profiles={},
    )  # fmt: skip
    told: list[str] = []
    result = cycle.CycleResult()
    stages = cycle._Stages(lambda stage, text, last: told.append(text), result.seconds)
    none: Any = None
    trainer = TrainerSettings.model_validate({"dpo": {"min_pairs": 2}})
    assert cycle._dpo(material, trainer, W, none, tmp_path, result, stages, None) is None
    assert (result.pairs, result.withdrawn) == (1, 1)
    assert "withdrawn: 1 rejected items (1 bought, 0 clicked), 1 whole pairs" in told[-1]
