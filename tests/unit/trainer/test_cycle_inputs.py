"""Over three generations nothing that is learned hangs on what validation users did.

Two shops differ in the items that validation users clicked, bought, preferred and were shown, and in nothing
else. Where any stage consumed one of these, its weights would differ.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from registry.bundles import context as contexts
from registry.bundles import rewards as reward_files
from registry.hold_out import HoldOut
from streams.errors import SidstreamError
from streams.events import CatalogItem, PreferencePair, SidAssignment, UserProfile
from streams.settings import KafkaSettings
from streams.state.keys import anonymous_user
from tests.tiny_explorations import T0, exploration
from tests.tiny_log import Logged
from tests.tiny_shop import ITEMS, SIZES, sid_of
from trainer.alignment.cycle_stage import align_to_window, window_rows
from trainer.codebooks import co_interactions
from trainer.cycle_inputs import CycleInputs, hold_out_of_lineage, inputs_of_window
from trainer.generator.build import fresh_generator
from trainer.generator.model import GeneratorForCausalLM
from trainer.rewards.online import RewardEvidence, learn_from_own_answers
from trainer.sequences.rows import TrainingRows
from trainer.settings import TrainerSettings
from trainer.tuning.ensemble import train_ensemble

BOOK = "c" * 16
USERS = [f"u{number}" for number in range(30)]
HOLD_OUT = HoldOut(share=0.3)
WINDOW_MS = 50
SETTINGS: dict[str, Any] = {
    "width": 32, "heads": 2, "max_items": 8, "epochs": 2, "max_seconds": None, "batch_positions": 64,
    "lr": 5e-3, "refresh_lr": 2e-3, "text_inputs": False, "members": 2, "pretrain": {"share": 0.5},
    "weights": {"search": 0.1, "summary": 0.1}, "context": {"min_count": 1}, "arithmetic": "float32",
    "validation_share": 0.3,
    # Nobody is scored: which weights are kept, and when a training stops, are for validation users to say.
    "validation_users": 0,
    "rewards": {
        "min_count": 3, "bins": 2, "online": {"rounds": 1, "requests": 30, "steps": 2, "max_fall": 1.0},
    },
    "dpo": {"min_pairs": 5, "batch": 8, "hard_negatives": 1},
}  # fmt: skip


class TwoFacedShop:
    """A shop whose validation users, or whose other users, do something else where `changed` says so."""

    def __init__(self, folder: Path, changed: str | None) -> None:
        self.logged, self.changed, self.number = Logged(folder / "log"), changed, 0
        for item in range(ITEMS):
            self.logged.events(
                CatalogItem.new(item_id=f"i{item:02}", title=f"red item {item % 4}", price=1.0 + item, ts=T0),
                SidAssignment.new(item_id=f"i{item:02}", sid=list(sid_of(item)), codebook=BOOK, ts=T0),
            )

    def item(self, user: str, item: int) -> int:
        """The item that this user takes where all others take `item`."""
        is_changed = self.changed == ("validation" if HOLD_OUT.has(user) else "learned")
        return (7 * item + 11 if is_changed else item) % ITEMS

    def open(self) -> None:
        """One window: everybody clicks and buys, is shown explored answers, and has a preference pair."""
        self.number, begin = self.number + 1, 1000 * self.number
        for at, user in enumerate(USERS):
            first = at + 5 * self.number
            walk = [f"i{self.item(user, first + step):02}" for step in range(5)]
            for step, item in enumerate(walk):
                self.logged.clicks(
                    (None, user, item, begin + 10 * step), scene="home" if first % 2 else "search"
                )
            self.logged.purchases((user, walk[2], begin + 25))
            self.logged.events(
                UserProfile.new(user_id=user, ts=T0 + begin, attributes={"town": f"t{first % 3}"})
            )
            self._explore(user, first, begin)
            self._prefer(user, first, begin)
        # The last click closes the windows of all explorations.
        self.logged.clicks((None, "late", "i00", begin + 900))

    def _explore(self, user: str, first: int, begin: int) -> None:
        for step in range(2):
            request = f"r{self.number}-{user}-{step}"
            candidates = [list(sid_of(self.item(user, first + other))) for other in (step, step + 3)]
            shown = f"i{self.item(user, first + step):02}"
            self.logged.explorations(
                exploration(
                    0, request_id=request, event_id=request, user_id=user, ts=T0 + begin, item_id=shown,
                    candidates=candidates, prompt=[list(sid_of(self.item(user, first - 1)))], codebook=BOOK,
                )
            )  # fmt: skip
            if step:
                self.logged.clicks((request, user, shown, begin + 5))

    def _prefer(self, user: str, first: int, begin: int) -> None:
        chosen, rejected, past = (self.item(user, first + step) for step in (6, 9, 1))
        pair = PreferencePair.new(
            event_id=f"p{self.number}-{user}", ts=T0 + begin + 500, user_id=user, codebook=BOOK,
            scheme="purchased_over_shown", chosen_item=f"i{chosen:02}", chosen=list(sid_of(chosen)),
            rejected_items=[f"i{rejected:02}"], rejected=[list(sid_of(rejected))],
            history=[list(sid_of(past))],
        )  # fmt: skip
        self.logged.events(pair)


def bundle_of(inputs: CycleInputs, folder: Path) -> Any:
    """What the next cycle reads of the bundle of this one."""
    (folder / "model").mkdir(parents=True)
    inputs.tokenizer.save_pretrained(folder / "model")
    contexts.write(inputs.context, folder)
    reward_files.write(inputs.rewards, folder)
    return SimpleNamespace(
        id="parent", path=folder, model=folder / "model", prompt=inputs.prompt,
        manifest=SimpleNamespace(validation=inputs.hold_out),
    )  # fmt: skip


def inputs_of(shop: TwoFacedShop, settings: TrainerSettings, parent: Any) -> CycleInputs:
    codebook: Any = SimpleNamespace(id=BOOK, sizes=SIZES)
    return inputs_of_window(
        settings, shop.logged.window(), codebook, parent, parent, horizon_ms=WINDOW_MS, window_ms=WINDOW_MS
    )


def digest(model: GeneratorForCausalLM) -> str:
    """A hash of all weights."""
    state = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        state.update(name.encode() + value.cpu().numpy().tobytes())
    return state.hexdigest()[:12]


def lineage(folder: Path, changed: str | None, generations: int = 3) -> list[tuple[str, Any]]:
    """What each stage of the cycles left: a digest of its weights, or the rows that it learned from."""
    settings = TrainerSettings.model_validate(SETTINGS)
    shop, parent = TwoFacedShop(folder, changed), None
    model: GeneratorForCausalLM | None = None
    seen: list[tuple[str, Any]] = []
    for number in range(generations):
        shop.open()
        inputs = inputs_of(shop, settings, parent)
        chosen = settings if number == 0 else settings.model_copy(
            update={"members": 1, "lr": settings.refresh_lr}
        )  # fmt: skip
        rows = TrainingRows(
            inputs.split, inputs.catalogue, inputs.tokenizer, inputs.prompt, chosen, inputs.negative_feedback
        )
        previous: GeneratorForCausalLM | None = model

        def begin(
            own: TrainerSettings, _rows: TrainingRows, _folder: Path | None, inputs: CycleInputs = inputs,
            previous: GeneratorForCausalLM | None = previous,
        ) -> GeneratorForCausalLM:  # fmt: skip
            return previous or fresh_generator(
                inputs.catalogue, None, inputs.prompt, len(inputs.tokenizer), own, inputs.context.size
            )

        model, result = train_ensemble(begin, rows, inputs.sids, chosen)
        seen.append(("sft", (result.steps, digest(model))))
        assert inputs.rewards is not None
        evidence = RewardEvidence(
            inputs.rewards, inputs.context, inputs.offers, inputs.led_to_purchase, inputs.explorations
        )
        online = learn_from_own_answers(model, rows, inputs.sids, evidence, None, lambda _: None)
        seen.append(("rewards", (online.steps, inputs.rewards.mass, digest(model))))
        alignment = align_to_window(
            inputs, chosen, WINDOW_MS, model, None, folder / f"dpo{number}", sequences=rows,
            report_progress=lambda _: None,
        )  # fmt: skip
        assert alignment.model is not None, alignment.refused
        seen.append(("dpo", (alignment.pairs, digest(alignment.model))))
        seen.append(("vocabulary", (inputs.context.fields, sorted(inputs.tokenizer.get_vocab()))))
        parent = bundle_of(inputs, folder / f"bundle{number}")
    seen.append(("negative feedback", len(rows.labelled_answers or [])))
    return seen


@pytest.mark.learning
def test_nothing_that_three_generations_learn_hangs_on_what_validation_users_did(tmp_path: Path) -> None:
    first, second = (lineage(tmp_path / str(changed), changed) for changed in (None, "validation"))
    assert first[-1][1] > 0, "explored answers that were not clicked are among what is learned"
    assert first == second
    # The same change in the other users is seen by every stage.
    control = lineage(tmp_path / "learned", "learned", generations=1)
    for stage in range(3):
        assert first[stage] != control[stage]


def test_no_record_of_a_validation_user_is_among_what_is_learned(tmp_path: Path) -> None:
    shop, parent = TwoFacedShop(tmp_path, None), None
    settings = TrainerSettings.model_validate(SETTINGS | {"validation_users": 1000})
    judging = {user for user in USERS if HOLD_OUT.has(user)}
    for number in range(3):
        shop.open()
        inputs = inputs_of(shop, settings, parent)
        assert {*inputs.log.users} == {*USERS, "late"} - judging
        window = window_rows(inputs, settings.dpo, WINDOW_MS, inputs.context, 1000)
        assert len(window.validation) == len(judging) * (number + 1)
        assert len(window.learned) == (len(USERS) - len(judging)) * (number + 1)
        hashed = {anonymous_user(user) for user in judging}
        assert inputs.explorations is not None
        assert inputs.judging_explorations is not None
        assert not hashed & {*inputs.explorations.users.tolist()}
        assert {*inputs.judging_explorations.users.tolist()} == hashed
        # Of this window; and of all windows.
        assert len(inputs.explorations) == 2 * (len(USERS) - len(judging))
        assert len(inputs.judging_explorations) == 2 * len(judging) * (number + 1)
        # Everybody came in the new window: nobody is judged by what an earlier model might know.
        held_out = inputs.split.held_out
        assert held_out.target_fresh is not None
        assert held_out.target_fresh.all()
        assert len(held_out.targets) == len(judging)
        parent = bundle_of(inputs, tmp_path / f"bundle{number}")


def test_a_codebook_is_fitted_to_what_the_others_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = [f"i{item:02}" for item in range(ITEMS)]
    sequences = []
    for changed in (None, "validation", "learned"):
        shop = TwoFacedShop(tmp_path / str(changed), changed)
        shop.open()
        window = shop.logged.window()
        monkeypatch.setattr(co_interactions, "read_window", lambda *_, window=window, **__: window)
        sequences.append(co_interactions.read_item_sequences(KafkaSettings(), items, HOLD_OUT))
    assert sequences[0] == sequences[1] != sequences[2]
    assert len(sequences[0]) == sum(not HOLD_OUT.has(user) for user in [*USERS, "late"])


def parent_without(share: float | None) -> Any:
    validation = None if share is None else HoldOut(share=share)
    return SimpleNamespace(id="parent", manifest=SimpleNamespace(validation=validation))


@pytest.mark.parametrize(("before", "share"), [(0.1, 0.1), (0.1, 0.05), (0.1, 0.0), (None, 0.0)])
def test_a_refresh_goes_on_where_its_parent_learned_from_none_who_judge_it(
    before: float | None, share: float
) -> None:
    settings = TrainerSettings.model_validate({"validation_share": share})
    assert hold_out_of_lineage(settings, parent_without(before)) == HoldOut(share=share)
    assert hold_out_of_lineage(settings, None) == HoldOut(share=share)


@pytest.mark.parametrize(("before", "share"), [(0.1, 0.2), (0.0, 0.1), (None, 0.1)])
def test_a_refresh_is_refused_where_its_parent_learned_from_those_who_would_judge_it(
    before: float | None, share: float
) -> None:
    settings = TrainerSettings.model_validate({"validation_share": share})
    remedy = rf"VALIDATION_SHARE is {share:g}.*Set it to {before or 0:g}, or .*--from-scratch"
    with pytest.raises(SidstreamError, match=remedy):
        hold_out_of_lineage(settings, parent_without(before))
