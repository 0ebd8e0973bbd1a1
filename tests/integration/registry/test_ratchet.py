"""A ratchet, each model worse on CTR by less than the margin, ends at the hold-out on the first model.

From the events of simulated shoppers to the release: agents' sums, gate, guards and cycle are the product's.
"""

import pytest
import redis

from benchmarks.ratchet import Ratchet, run_ratchet, settings_of
from benchmarks.true_rate_shop import SimulatedShoppers, TrueRates
from registry.arms import ANCHOR, CHAMPION

pytestmark = pytest.mark.integration

# Effects so large, and users so alike, that a few of them decide.
SHOPPERS = SimulatedShoppers(users=1500, days=7.0, requests=2.0, cohesion=400.0, first=TrueRates(0.5, 0.3))
RATCHET = Ratchet(ctr=0.95, cvr=(1.25, 1.25))


@pytest.mark.parametrize(("anchor_share", "ctr"), [(0.15, [0.95, 0.95, 0.95]), (0.0, [0.95, 0.9025])])
def test_a_ratchet_is_stopped_by_the_anchor_and_by_nothing_else(anchor_share, ctr, registry, redis_url):
    with redis.Redis.from_url(redis_url) as connection:
        connection.flushall()
    rollout = {"anchor": anchor_share, "steps": [1.0], "watch_requests": 1}
    changed = {"rollout": rollout, "gate": {"anchor_margin": 0.03}}
    settings = settings_of(registry.tracking_uri, registry.name, registry.cache, changed)
    ratchet_run = run_ratchet("test", 1, len(ctr), registry, redis_url, settings, SHOPPERS, RATCHET)
    assert [row["ctr"] for row in ratchet_run.rows] == ctr
    assert [row["refused_by_anchor"] for row in ratchet_run.rows] == [
        False,
        *(anchor_share > 0 for _ in ctr[1:]),
    ]
    if anchor_share:
        assert all("against the anchor: CTR is" in row["sentence"] for row in ratchet_run.rows[1:])
        assert registry.alias(ANCHOR) != registry.alias(CHAMPION)
