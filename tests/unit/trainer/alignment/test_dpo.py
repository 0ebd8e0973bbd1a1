"""DPO on rows of token ids: what becomes a row, that the margin rises, and when it stops."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from registry.bundles.context import Context
from registry.bundles.prompt import BOS, PAD
from streams.errors import SidstreamError
from streams.events import PreferencePair
from tests.tiny_shop import Shop, shop
from trainer.alignment.dpo import align
from trainer.alignment.rows import collate_preferences, preference_rows
from trainer.alignment.scores import score_answers
from trainer.offline_checks.probe import ProbeOutcome
from trainer.settings import DpoSettings
from trainer.tuning.next_item import LogReplay
from trainer.tuning.sft import train

CODEBOOK = "c" * 16


def pair(number: int, **overrides: Any) -> PreferencePair:
    fields: dict[str, Any] = {
        "event_id": f"p{number}", "ts": 1_600_000_000_000 + number, "user_id": "u", "codebook": CODEBOOK,
        "scheme": "purchased_over_shown", "chosen_item": "i", "chosen": [0, 0, 0], "rejected_items": ["j"],
        "rejected": [[1, 0, 0]], "history": [[2, 1, 0], [3, 1, 0]],
    }  # fmt: skip
    return PreferencePair.new(**fields | overrides)


def settings_of(tiny_shop: Shop, **dpo: Any) -> Any:
    chosen = DpoSettings.model_validate({"batch": 16, "lr": 3e-3, "min_pairs": 1} | dpo)
    return tiny_shop.settings.model_copy(update={"dpo": chosen})


def test_rows_are_prompts_with_trigger_and_up_to_k_rejected_sids() -> None:
    tiny_shop = shop()
    dpo = DpoSettings.model_validate({"max_rejected": 2})
    pairs = [
        pair(1, trigger=[1, 2, 3], rejected=[[1, 0, 0], [0, 0, 0], [1, 0, 0], [2, 0, 0], [3, 0, 0]]),
        pair(1),  # the same event again
        pair(2, codebook="d" * 16),
        pair(3, chosen=[9, 9, 9]),
        pair(4, history=[], trigger=None),
        pair(5, rejected=[[0, 0, 0]]),  # collided: the chosen SID itself
    ]
    rows = preference_rows(pairs, CODEBOOK, tiny_shop.prompt, dpo)
    tokens = tiny_shop.prompt.tokens
    assert rows == [
        {
            "prompt_ids": [BOS, *tokens((2, 1, 0)), *tokens((3, 1, 0)), *tokens((1, 2, 3))],
            "chosen_ids": tokens((0, 0, 0)), "rejected_ids": [tokens((1, 0, 0)), tokens((2, 0, 0))],
        },
        {"prompt_ids": [BOS], "chosen_ids": tokens((0, 0, 0)), "rejected_ids": [tokens((1, 0, 0))]},
    ]  # fmt: skip


def test_a_prompt_ends_in_its_context_however_short_it_is() -> None:
    tiny_shop = shop()
    context = Context(90, {"scene": ["home"], "profile.country": ["Peru", "Japan"]})
    profiles = {"u": {"country": "Japan"}, "v": {"country": "Mars"}}
    pairs = [
        pair(1, scene="home"), pair(2), pair(3, user_id="v", scene="attic"),
        pair(4, scene="home", history=[[2, 1, 0]] * 30),
    ]  # fmt: skip
    dpo = DpoSettings.model_validate({"max_items": 3})
    rows = preference_rows(pairs, CODEBOOK, tiny_shop.prompt, dpo, context, profiles)
    history = [BOS, *tiny_shop.prompt.tokens((2, 1, 0)), *tiny_shop.prompt.tokens((3, 1, 0))]
    assert [row["prompt_ids"] for row in rows] == [
        [*history, 90, 92], [*history, 92], history, [BOS, *tiny_shop.prompt.tokens((2, 1, 0)) * 3, 90, 92],
    ]  # fmt: skip


@pytest.mark.learning
def test_alignment_learns_what_is_preferred_in_each_scene(tmp_path: Path) -> None:
    tiny_shop = shop(scenes=True)
    model = tiny_shop.model()
    first_sid, second_sid = [0, 0, 0], [1, 0, 0]
    pairs = [
        pair(2 * n + up, scene="up" if up else "down", chosen=first_sid if up else second_sid,
             rejected=[second_sid if up else first_sid], history=[[n % 4, n % 3, n % 5]])
        for n in range(200) for up in (0, 1)
    ]  # fmt: skip
    settings = settings_of(tiny_shop, weight=1.0, sft_weight=0.1, lr=2e-2, max_drop=50.0)
    rows = preference_rows(pairs, CODEBOOK, tiny_shop.prompt, settings.dpo, tiny_shop.context)
    aligned, _ = align(model, tiny_shop.tokenizer, rows, settings)
    tokens = tiny_shop.prompt.tokens
    history = [BOS, *tokens((1, 1, 1))]
    for scene, sign in (("up", 1), ("down", -1)):
        prompt = history + tiny_shop.context.row({"scene": scene})
        margin = _log_prob(aligned, prompt, tokens(first_sid)) - _log_prob(
            aligned, prompt, tokens(second_sid)
        )
        assert sign * margin > 1


def test_the_newest_pairs_of_the_wanted_schemes_are_kept() -> None:
    tiny_shop = shop()
    dpo = DpoSettings.model_validate({"max_pairs": 2, "schemes": ["purchased_over_shown"]})
    pairs = [pair(n, chosen=[n, 0, 1]) for n in range(4)] + [pair(9, scheme="clicked_over_shown")]
    rows = preference_rows(pairs, CODEBOOK, tiny_shop.prompt, dpo)
    assert [tiny_shop.prompt.sid(row["chosen_ids"]) for row in rows] == [(2, 0, 1), (3, 0, 1)]


def _log_prob(model: Any, prompt: list[int], answer: list[int]) -> float:
    with torch.no_grad():
        logs = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    return sum(float(logs[len(prompt) - 1 + at, token]) for at, token in enumerate(answer))


@pytest.mark.learning
def test_the_margin_of_chosen_over_rejected_rises_and_the_reference_stays(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tiny_shop = shop()
    model = tiny_shop.model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pairs = [pair(n, history=[[n % 4, n % 3, n % 5]]) for n in range(96)]
    settings = settings_of(tiny_shop, weight=1.0, sft_weight=0.1)
    rows = preference_rows(pairs, CODEBOOK, tiny_shop.prompt, settings.dpo)
    aligned, result = align(model, tiny_shop.tokenizer, rows, settings)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (result.pairs, result.rejected, result.steps, result.kept) == (96, 96, 6, 6)
    assert result.stopped == "all pairs seen"
    assert result.drop < 0.5
    margins = []
    for scored_model in (model, aligned):
        row = rows[7]
        chosen = _log_prob(scored_model, row["prompt_ids"], row["chosen_ids"])
        margins.append(chosen - _log_prob(scored_model, row["prompt_ids"], row["rejected_ids"][0]))
    assert margins[1] > margins[0] + 0.5
    assert capfd.readouterr() == ("", "")


def test_it_stops_when_the_chosen_sid_falls_too_far_below_the_reference(tmp_path: Path) -> None:
    tiny_shop = shop()
    # Without a next-token term, and chosen and rejected sharing all but the last code under a huge rate, the
    # policy leaves the reference at once.
    settings = settings_of(tiny_shop, weight=1.0, sft_weight=0.0, lr=0.5, max_drop=0.01, batch=4)
    rows = preference_rows([pair(n) for n in range(200)], CODEBOOK, tiny_shop.prompt, settings.dpo)
    _, result = align(tiny_shop.model(), tiny_shop.tokenizer, rows, settings)
    assert result.steps < 50
    assert "nats below the reference" in result.stopped


def shares(hits: float, valid: float, users: int = 1000) -> ProbeOutcome:
    """Users of whom these shares are hit and answered validly, the same ones as far as they go."""
    return ProbeOutcome(np.arange(users) < hits * users, np.arange(users) < valid * users)


def test_noise_on_few_users_is_no_collapse(tmp_path: Path) -> None:
    tiny_shop = shop()
    settings = settings_of(tiny_shop, probe_steps=1, batch=8)
    rows = preference_rows([pair(n) for n in range(80)], CODEBOOK, tiny_shop.prompt, settings.dpo)
    rng = np.random.default_rng(0)

    def probe(model: Any) -> ProbeOutcome:
        # A tenth less, at most: four of forty users, and others are hit than before.
        return ProbeOutcome(rng.random(300) < 0.12, rng.random(300) < 0.9)

    _, result = align(tiny_shop.model(), tiny_shop.tokenizer, rows, settings, probe=probe)
    assert (result.stopped, result.kept) == ("all pairs seen", result.steps)


def test_the_weights_go_back_to_the_last_look_that_passed(tmp_path: Path) -> None:
    tiny_shop = shop()
    settings = settings_of(tiny_shop, probe_steps=2, batch=8, max_recall_fall=0.1)
    rows = preference_rows([pair(n) for n in range(80)], CODEBOOK, tiny_shop.prompt, settings.dpo)
    seen: list[dict[str, torch.Tensor]] = []
    answers = iter([0.5, 0.48, 0.46, 0.42, 0.5])

    def probe(model: Any) -> ProbeOutcome:
        seen.append({name: value.detach().clone() for name, value in model.named_parameters()})
        return shares(next(answers), 1.0)

    aligned, result = align(tiny_shop.model(), tiny_shop.tokenizer, rows, settings, probe=probe)
    assert (result.steps, result.kept) == (6, 4)
    assert "fell from 0.500 to 0.420; the weights of step 4 are kept" in result.stopped
    assert all(torch.equal(value, seen[2][name]) for name, value in aligned.named_parameters())
    assert not all(torch.equal(value, seen[3][name]) for name, value in aligned.named_parameters())


@pytest.mark.parametrize(("users", "stops"), [(1000, True), (50, False)])
def test_a_fall_beyond_the_margin_ends_it_as_soon_as_it_is_more_than_noise(
    users: int, stops: bool, tmp_path: Path
) -> None:
    tiny_shop = shop()
    settings = settings_of(tiny_shop, probe_steps=2, batch=8, max_recall_fall=0.1)
    rows = preference_rows([pair(n) for n in range(16)], CODEBOOK, tiny_shop.prompt, settings.dpo)
    # A fall of .06 where .05 may be: of 1,000 users the 1 % bound is .043 and up, of 50 it is below 0.
    answers = iter([0.5, 0.44])
    _, result = align(
        tiny_shop.model(), tiny_shop.tokenizer, rows, settings,
        probe=lambda _: shares(next(answers), 1.0, users),
    )  # fmt: skip
    assert (result.kept, "fell from 0.500 to 0.440" in result.stopped) == ((0, True) if stops else (2, False))


def test_a_short_stage_is_looked_at_several_times(tmp_path: Path) -> None:
    tiny_shop = shop()
    settings = settings_of(tiny_shop, probe_steps=100, batch=8)
    rows = preference_rows([pair(n) for n in range(320)], CODEBOOK, tiny_shop.prompt, settings.dpo)
    _, result = align(
        tiny_shop.model(), tiny_shop.tokenizer, rows, settings, probe=lambda _: shares(0.5, 1.0)
    )
    assert result.steps == 40
    assert [point["step"] for point in result.curve if "hr10" in point] == [6, 12, 18, 24, 30, 36, 40]


def test_it_stops_when_more_of_the_unconstrained_answers_are_no_sids(tmp_path: Path) -> None:
    tiny_shop = shop()
    settings = settings_of(tiny_shop, probe_steps=1, batch=8, max_invalid_rise=0.05)
    rows = preference_rows([pair(n) for n in range(80)], CODEBOOK, tiny_shop.prompt, settings.dpo)
    answers = iter([0.9, 0.86, 0.82])
    _, result = align(
        tiny_shop.model(),
        tiny_shop.tokenizer,
        rows,
        settings,
        probe=lambda _: shares(0.5, next(answers)),
    )
    assert result.steps == 2
    assert "the share of real SIDs fell from 0.900 to 0.820; the weights of step 1 " in result.stopped


@pytest.mark.learning
@pytest.mark.parametrize("loss", ["dpo", "softmax_dpo"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_every_loss_raises_the_chosen_sid_over_all_that_were_rejected(
    loss: str, dynamic: bool, tmp_path: Path
) -> None:
    tiny_shop = shop()
    model = tiny_shop.model()
    refused = [[1, 0, 0], [2, 1, 0], [3, 2, 1]]
    pairs = [pair(n, history=[[n % 4, n % 3, n % 5]], rejected=refused) for n in range(400)]
    settings = settings_of(tiny_shop, loss=loss, dynamic_beta=dynamic, max_rejected=3)
    rows = preference_rows(pairs, CODEBOOK, tiny_shop.prompt, settings.dpo)
    aligned, result = align(model, tiny_shop.tokenizer, rows, settings)
    assert (result.rejected, result.steps) == (1200, 25)
    assert (result.beta != settings.dpo.beta) == dynamic
    row = rows[7]
    for answer in row["rejected_ids"]:
        margins = [
            _log_prob(scored_model, row["prompt_ids"], row["chosen_ids"])
            - _log_prob(scored_model, row["prompt_ids"], answer)
            for scored_model in (model, aligned)
        ]
        assert margins[1] > margins[0] + 0.5


@pytest.mark.learning
def test_the_logs_own_sequences_hold_what_was_learned_from_them(tmp_path: Path) -> None:
    tiny_shop = shop(epochs=6)
    model = tiny_shop.model()
    train(model, tiny_shop.rows, tiny_shop.sids, tiny_shop.settings)
    # What is preferred has nothing to do with what comes next.
    pairs = [pair(n, chosen=[0, 0, 0], history=[[n % 4, n % 3, 0]]) for n in range(200)]
    losses = []
    for weight in (0.0, 1.0):
        settings = settings_of(tiny_shop, replay_weight=weight, sft_weight=1.0, max_drop=50)
        rows = preference_rows(pairs, CODEBOOK, tiny_shop.prompt, settings.dpo)
        aligned, _ = align(model, tiny_shop.tokenizer, rows, settings, sequences=tiny_shop.rows)
        with torch.no_grad():
            losses.append(float(LogReplay(tiny_shop.rows).loss(aligned)))
    with torch.no_grad():
        before = float(LogReplay(tiny_shop.rows).loss(model))
    assert losses[0] > before + 1
    assert losses[1] < before + (losses[0] - before) / 2


@pytest.mark.parametrize("loss", ["dpo", "softmax_dpo"])
def test_the_joint_loss_of_two_steps_is_the_one_said_by_hand(loss: str, tmp_path: Path) -> None:
    tiny_shop = shop(arithmetic="float32")
    model = tiny_shop.outspoken(seed=2)
    pairs = [
        pair(n, rejected=[[1, 0, 0], [2, 0, 0], [3, 0, 0]][: 1 + n % 3], history=[[n % 4, n % 3, 0]])
        for n in range(12)
    ]
    dpo_settings = {
        "loss": loss,
        "beta": 0.7,
        "weight": 0.8,
        "sft_weight": 0.3,
        "replay_weight": 0.2,
        "max_drop": 50,
    }
    settings = settings_of(tiny_shop, **dpo_settings)
    rows = preference_rows(pairs, CODEBOOK, tiny_shop.prompt, settings.dpo)
    batch = collate_preferences(rows, PAD)

    def by_hand(policy: Any, replayed: float) -> float:
        total = 0.2 * replayed
        for head, before in zip(score_answers(policy, batch), score_answers(model, batch), strict=True):
            total += 0.3 * float(head.nll)
            risen, costs = head.scores - before.scores, []
            for at in range(12):
                down = [-0.7 * float(risen[0, at] - risen[1 + k, at]) for k in range(1 + at % 3)]
                costs.append(
                    sum(math.log1p(math.exp(fall)) for fall in down) / len(down)
                    if loss == "dpo" else math.log1p(sum(map(math.exp, down)))
                )  # fmt: skip
            total += 0.8 * sum(costs) / 12
        return total

    def run(epochs: int) -> tuple[Any, float]:
        chosen = settings_of(tiny_shop, **dpo_settings, epochs=epochs)
        aligned, result = align(model, tiny_shop.tokenizer, rows, chosen, sequences=tiny_shop.rows)
        assert result.steps == epochs
        return aligned, result.loss

    moved, first = run(1)
    _, both = run(2)
    with torch.no_grad():
        replay = LogReplay(tiny_shop.rows)
        expected = by_hand(model, float(replay.loss(model)))
        assert first == pytest.approx(expected, rel=1e-4)
        # The second step begins where the run of one step ended.
        expected += by_hand(moved, float(replay.loss(moved)))
    assert both == pytest.approx(expected / 2, rel=1e-4)


@pytest.mark.parametrize("loss", ["dpo", "softmax_dpo"])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("beside", [0.0, 0.1])
def test_every_margin_is_zero_before_the_first_change(
    loss: str, dynamic: bool, beside: float, tmp_path: Path
) -> None:
    tiny_shop = shop(scenes=True)
    model = tiny_shop.model(dropout=0.5, item_dropout=0.5)
    refused = [[1, 0, 0], [2, 0, 0]]
    pairs = [
        pair(n, rejected=refused[: 1 + n % 2], scene="up", history=[[n % 4, n % 3, 0]]) for n in range(40)
    ]
    # A rate that moves no weight, so that each of the logged steps is a first one.
    settings = settings_of(
        tiny_shop, loss=loss, dynamic_beta=dynamic, beta=2.0, batch=8, lr=1e-30, sft_weight=beside,
        replay_weight=beside, max_rejected=2,
    )  # fmt: skip
    rows = preference_rows(pairs, CODEBOOK, tiny_shop.prompt, settings.dpo, tiny_shop.context)
    _, result = align(model, tiny_shop.tokenizer, rows, settings, sequences=tiny_shop.rows)
    # The mean of all margins is 0 and none is above 0: each is 0, to the bit.
    assert (result.margin, result.accuracy, result.drop) == (0.0, 0.0, 0.0)
    if not beside:
        # Of both heads, half of the pairs with one rejected answer and half with two, all with margins of 0.
        one_head = math.log(2) if loss == "dpo" else (math.log(2) + math.log(3)) / 2
        assert result.loss == pytest.approx(2 * one_head, rel=1e-5)


def test_a_stage_of_a_single_step_has_no_warm_up_to_lose_it_in(tmp_path: Path) -> None:
    tiny_shop = shop()
    model, settings = tiny_shop.model(), settings_of(tiny_shop, batch=64)
    rows = preference_rows([pair(n) for n in range(8)], CODEBOOK, tiny_shop.prompt, settings.dpo)
    aligned, result = align(model, tiny_shop.tokenizer, rows, settings)
    assert result.steps == 1
    assert not torch.equal(aligned.model.embed_tokens.weight, model.model.embed_tokens.weight)


def test_without_rows_there_is_nothing_to_align_to(tmp_path: Path) -> None:
    tiny_shop = shop()
    with pytest.raises(SidstreamError, match="no preference rows"):
        align(tiny_shop.model(), tiny_shop.tokenizer, [], tiny_shop.settings)
