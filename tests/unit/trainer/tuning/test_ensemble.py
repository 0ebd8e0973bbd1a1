"""Members of a generator learn one by one, share the time, and go on in the one that was broken off."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.tiny_shop import Shop, shop
from trainer.generator.merge import merge_generators
from trainer.generator.model import GeneratorForCausalLM
from trainer.offline_checks.ranking import item_logits
from trainer.sequences.rows import TrainingRows
from trainer.settings import TrainerSettings
from trainer.tuning.ensemble import member_settings, train_ensemble
from trainer.tuning.pretrain import pretrain_and_tune


def fresh(tiny: Shop, begun: list[int] | None = None):
    """How a member of a shop begins; `begun` is told of their seeds."""

    def begin(own: TrainerSettings, rows: TrainingRows, folder: Path | None) -> GeneratorForCausalLM:
        if begun is not None:
            begun.append(own.seed)
        return tiny.model(own.seed, dropout=0.2)

    return begin


def same(one: GeneratorForCausalLM, other: GeneratorForCausalLM) -> bool:
    pairs = zip(one.named_parameters(), other.parameters(), strict=True)
    return all(torch.equal(a, b) for (_, a), b in pairs)


def test_one_member_is_the_training_that_there_was() -> None:
    tiny = shop(epochs=1)
    alone, _ = train_ensemble(fresh(tiny), tiny.rows, tiny.sids, tiny.settings)
    plain = tiny.model(tiny.settings.seed, dropout=0.2)
    pretrain_and_tune(plain, tiny.rows, tiny.sids, tiny.settings)
    assert same(alone, plain)


def test_members_begin_and_learn_otherwise_and_answer_together() -> None:
    tiny = shop(epochs=1, members=3)
    model, result = train_ensemble(fresh(tiny), tiny.rows, tiny.sids, tiny.settings)
    alone = []
    for own in member_settings(tiny.settings):
        one = tiny.model(own.seed, dropout=0.2)
        pretrain_and_tune(one, tiny.rows.with_settings(own), tiny.sids, own)
        alone.append(one)
    assert not any(same(alone[0], other) for other in alone[1:])
    assert same(model, merge_generators(alone))
    assert model.config.hidden_size == 3 * 32
    codes, lengths = torch.from_numpy(tiny.catalogue.codes[None, :4]), torch.tensor([4])
    with torch.no_grad():
        logits = [item_logits(one, one.encode(codes, lengths), codes, lengths)[0] for one in (model, *alone)]
    torch.testing.assert_close(logits[0], torch.stack(logits[1:]).mean(0), atol=1e-4, rtol=1e-4)
    assert result.steps == sum(one.steps for one in result.members) > 0
    assert result.quality is not None
    assert all(one.curve for one in result.members)


def test_the_order_of_the_rows_is_each_members_own() -> None:
    tiny = shop(members=2)
    first, second = (
        tiny.rows.with_settings(own).sequence_batches(0) for own in member_settings(tiny.settings)
    )
    assert [piece.items.tolist() for piece in first] != [piece.items.tolist() for piece in second]


def test_members_share_the_time_budget() -> None:
    assert [own.max_seconds for own in member_settings(shop(members=4, max_seconds=60.0).settings)] == [
        15.0
    ] * 4
    assert member_settings(shop(members=4).settings)[3].max_seconds is None


@pytest.mark.parametrize("part", [0.2, 0.7])
def test_a_broken_run_goes_on_in_its_member_and_ends_as_an_unbroken_one(part: float, tmp_path: Path) -> None:
    tiny = shop(epochs=2, members=2)
    whole, unbroken = train_ensemble(fresh(tiny), tiny.rows, tiny.sids, tiny.settings, tmp_path / "whole")
    calls = iter(range(1000))
    _, cut = train_ensemble(
        fresh(tiny), tiny.rows, tiny.sids, tiny.settings, tmp_path / "broken",
        stop=lambda: next(calls) == round(part * unbroken.steps),
    )  # fmt: skip
    assert (cut.stopped, cut.members) == ("interrupted", [])
    begun: list[int] = []
    second, resumed = train_ensemble(
        fresh(tiny, begun), tiny.rows, tiny.sids, tiny.settings, tmp_path / "broken"
    )
    assert same(whole, second)
    assert resumed.steps == unbroken.steps
    assert begun == [own.seed for own in member_settings(tiny.settings)]


def test_a_first_member_that_has_learned_is_not_trained_again() -> None:
    tiny = shop(epochs=1, members=2)
    first = tiny.model(tiny.settings.seed, dropout=0.2)
    done = pretrain_and_tune(first, tiny.rows, tiny.sids, member_settings(tiny.settings)[0])
    begun: list[int] = []
    model, result = train_ensemble(
        fresh(tiny, begun), tiny.rows, tiny.sids, tiny.settings, first_member=(first, done)
    )
    assert begun == [tiny.settings.seed + 1000]
    assert result.members[0] is done
    whole, _ = train_ensemble(fresh(tiny), tiny.rows, tiny.sids, tiny.settings)
    assert same(model, whole)
