"""SASRec: it learns what it should, from every event once, and sees no future."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny_sequences import chains
from trainer.baselines import sasrec
from trainer.baselines.sasrec import SasRec, SasRecSettings
from trainer.evaluation import splits
from trainer.evaluation.validation import VALIDATION_USERS, validation_targets


def quiet(text):
    pass


@pytest.mark.learning
@pytest.mark.parametrize("loss", ["softmax", "gbce"])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_it_learns_who_follows_whom(loss, schedule):
    split = splits.leave_one_out(chains(users=240, items=20, length=8))
    ranker = SasRec(
        SasRecSettings(
            width=16, layers=1, dropout=0.0, lr=0.01, batch=16, epochs=30, patience=30, loss=loss,
            schedule=schedule, negatives=4,
        )
    )  # fmt: skip
    ranker.fit(split, 1, quiet)
    listed = ranker.rank(split.test.histories, 1, "none")[:, 0]
    assert (listed == split.test.targets).mean() > 0.8


@given(
    st.lists(st.integers(0, 23), min_size=1, max_size=6), st.integers(1, 7), st.integers(0, 5),
    st.sampled_from(["position", "prefix"]),
)  # fmt: skip
def test_every_event_but_a_users_first_is_a_target_once_in_an_epoch(lengths, length, epoch, samples):
    # An item's row tells user and place.
    train = [np.arange(count) + 100 * user for user, count in enumerate(lengths)]
    settings = SasRecSettings(samples=samples, length=length, batch=2)
    targets = []
    for _, rows, batch_targets in sasrec.training_batches(train, settings, 3, epoch):
        assert rows.shape[1] <= length
        for row, target in zip(rows.numpy(), batch_targets.numpy(), strict=True):
            at = target >= 0
            # The input at a target's place is the item just before it, and the row is without gaps.
            assert (row[at] == target[at] - 1).all()
            assert (np.diff(row[row >= 0]) == 1).all()
            targets += target[at].tolist()
    assert sorted(targets) == sorted(item for row in train for item in row[1:].tolist())


def test_a_state_depends_on_its_own_past_only():
    network = sasrec.Network(20, SasRecSettings(width=8, length=6)).eval()
    first, other = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[1, 2, 9, 8]])
    with torch.no_grad():
        one, two = network(first), network(other)
        assert torch.allclose(one[:, :2], two[:, :2])
        assert not torch.allclose(one[:, 2:], two[:, 2:])
        # Padding on the right changes nothing.
        padded = network(torch.tensor([[1, 2, 3, 4, -1, -1]]))
        assert torch.allclose(padded[:, :4], one, atol=1e-6)


def test_a_new_epoch_cuts_long_sequences_elsewhere():
    train = [np.arange(200)]
    settings = SasRecSettings(length=10)
    cuts = [
        {int(row[0]) for _, rows, _ in sasrec.training_batches(train, settings, 1, epoch) for row in rows}
        for epoch in range(5)
    ]
    assert len({frozenset(cut) for cut in cuts}) > 1


@pytest.mark.learning
def test_the_weights_kept_are_those_that_validation_liked_best():
    split = splits.leave_one_out(chains(users=30))
    progress_lines = []
    ranker = SasRec(SasRecSettings(width=8, lr=0.5, epochs=6, patience=2))
    ranker.fit(split, 1, progress_lines.append)
    best = max(float(line.split("NDCG@10 ")[1].split(",")[0]) for line in progress_lines)
    targets = validation_targets(split, VALIDATION_USERS, 1, ranker.settings.length)
    assert f"{ranker.ndcg(targets):.4f}" == f"{best:.4f}"
    assert ranker.validation_ndcg == pytest.approx(best, abs=1e-4)


def test_a_budget_on_the_processor_ends_the_epoch_that_it_ends_in():
    split = splits.leave_one_out(chains(users=30))
    progress_lines = []
    ranker = SasRec(SasRecSettings(width=8, batch=4, cpu_seconds=1e-9))
    ranker.fit(split, 1, progress_lines.append)
    assert len(progress_lines) == 1
    # One step is learned all the same: a model without any is no model.
    steps = {int(state["step"]) for state in ranker.optimizer.state_dict()["state"].values()}
    assert steps == {1}
