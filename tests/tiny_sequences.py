"""Data sets small enough to be worked out by hand, for the tests of evaluation."""

import numpy as np

from trainer.evaluation.sequences import SequenceDataset


def sequences(*rows, ts=None, categories=None, sids=None, items=None, bought_ts=None):
    """A data set of users whose item rows are `rows`, and whose times are `ts`; `bought_ts`: -1 where not."""
    size = items or 1 + max((item for row in rows for item in row), default=0)
    when = None if bought_ts is None else [np.array(row, np.int64) for row in bought_ts]
    return SequenceDataset(
        "tiny", [f"u{n}" for n in range(len(rows))], [np.array(row, np.int64) for row in rows],
        [f"i{n}" for n in range(size)], [f"word{n % 3} thing{n}" for n in range(size)],
        None if ts is None else [np.array(row, np.int64) for row in ts], categories,
        None if sids is None else np.array(sids, np.int64),
        bought=when and [row >= 0 for row in when], bought_ts=when,
    )  # fmt: skip


def chains(users=40, items=15, length=6, seed=0):
    """Users who walk around a circle of items from a place of their own, with times and three categories."""
    random = np.random.default_rng(seed)
    rows = [(random.integers(items) + np.arange(length)) % items for _ in range(users)]
    ts = [np.sort(random.integers(0, 1000, length)) for _ in range(users)]
    # The last item is in nobody's hands: models have to live with an item that they never saw.
    categories = [f"c{item * 3 // items}" for item in range(items)] + [""]
    return sequences(*rows, ts=ts, categories=categories, items=items + 1)
