"""What the readers of data sets keep of a purchase."""

import numpy as np

from tests.tiny_sequences import sequences
from trainer.evaluation import datasets, generator_ranker, splits

REES46 = """event_time,event_type,product_id,category_id,category_code,brand,price,user_id,user_session
2019-10-01 00:00:00 UTC,view,1,77,electronics.smartphone,samsung,131.5,u1,s
2019-10-01 00:00:01 UTC,view,2,78,,,0.00,u1,s
2019-10-01 00:00:02 UTC,cart,1,77,electronics.smartphone,samsung,131.5,u1,s
2019-10-01 00:00:03 UTC,purchase,1,77,electronics.smartphone,samsung,130.5,u1,s
2019-10-01 00:00:04 UTC,cart,3,78,,,0.00,u1,s
"""
# By type: 0 click, 1 buy, 2 favourite, 3 cart.
TMALL = """user_id,brand_id,type,visit_datetime
7,10,0,6-4
7,11,2,6-4
7,10,1,6-5
7,12,3,6-5
7,11,1,6-8
"""


def lists(arrays):
    return [row.tolist() for row in arrays]


def test_rees46_says_which_steps_were_bought(tmp_path):
    (tmp_path / "events.csv").write_text(REES46)
    data = datasets.load_dataset("rees46", tmp_path)
    assert lists(data.items) == [[0, 1, 0, 2]]
    assert lists(data.bought) == [[True, False, True, False]]
    first = 1_569_888_000_000
    assert lists(data.bought_ts) == [[first + 3000, -1, first + 3000, -1]]


def test_tmall_says_which_steps_were_bought(tmp_path):
    (tmp_path / "tmall2014").mkdir()
    (tmp_path / "tmall2014" / "events.csv").write_text(TMALL)
    data = datasets.load_dataset("tmall2014", tmp_path)
    assert lists(data.items) == [[0, 1, 0, 2, 1]]
    # The favourite was bought four days later: that is too long.
    assert lists(data.bought) == [[True, False, True, False, True]]


def test_the_trainers_log_knows_what_was_bought_before_the_cut():
    data = sequences([1, 2, 3], [4, 5, 6], ts=[[1, 10, 20], [2, 3, 20]], bought_ts=[[1, 22, -1], [-1, 4, 20]])
    split = splits.split_by_time(data, 15, 21)
    no_profiles = np.zeros((2, 0), dtype=np.int32)
    log = generator_ranker.training_log(split, no_profiles)
    assert log.items.tolist() == [1, 2, 4, 5]
    # The second item of user 0 was bought after the cut.
    assert log.bought.tolist() == [True, False, False, True]
    plain = splits.split_by_time(sequences([1, 2, 3], ts=[[1, 10, 20]]), 15, 21)
    assert not generator_ranker.training_log(plain, no_profiles[:1]).bought.any()
