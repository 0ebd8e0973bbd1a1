"""Names of the Redis keys, and the only form in which a user may appear in a log."""

from __future__ import annotations

from hashlib import blake2b

# The hash tag is between braces: all keys of a user are in one slot of a Redis Cluster, so that one script
# may use them together; so are the two hashes of a codebook.


def history(user_id: str) -> str:
    """Packed history of a user (streams.state.history)."""
    return f"h:{{{user_id}}}"


def user_of_history(key: bytes) -> str:
    """The user whose packed history has this key."""
    return key[3:-1].decode()


def profile(user_id: str) -> str:
    """Packed profile of a user (streams.state.profile)."""
    return f"u:{{{user_id}}}"


def preferences(user_id: str) -> str:
    """A user's clicks, purchases and slates whose attribution window is open."""
    return f"p:{{{user_id}}}"


def outcomes(user_id: str) -> str:
    """A user's recommendations whose attribution window is open."""
    return f"o:{{{user_id}}}"


def sums(trial: str, user_id: str) -> str:
    """Hash of one user in one trial: arm, bundle, and `<cohort>:i`, `<cohort>:c`, `<cohort>:o`.

    Impressions, clicks and orders of the requests whose window starts in that cohort (time // length); a
    field that is 0 is not stored.
    """
    return f"sums:{trial}:{{{user_id}}}"


def sums_pattern(trial: str) -> str:
    """Glob over the sums of every user in one trial (for SCAN)."""
    escaped = "".join(f"\\{c}" if c in "*?[]^-\\" else c for c in trial)
    return f"sums:{escaped}:{{*}}"


def outcomes_rules() -> str:
    """Hash window_ms, lateness_ms, cohort_ms, partitions: the rules by which the agents sum outcomes."""
    return "outcomes-rules"


def health(trial: str) -> str:
    """Hash of serving's counts of each arm in one trial: requests, failures, times, invalid mass."""
    return f"health:{trial}"


def sids(codebook: str) -> str:
    """Hash item_id -> packed SID under one codebook."""
    return f"sids:{{{codebook}}}"


def slots(codebook: str) -> str:
    """Hash packed SID -> item_id under one codebook: the taken slots."""
    return f"slots:{{{codebook}}}"


def parked(item_id: str) -> str:
    """Hash source position -> event that waits for the item's SID."""
    return f"parked:{{{item_id}}}"


def parked_items(partition: int) -> str:
    """Sorted set of the items with parked events, by the time (ms) at which the first was parked."""
    return f"parked-items:{{{partition}}}"


def due(stage: str, partition: int) -> str:
    """Sorted set of a partition's users with open state, by the event time (ms) at which a window closes."""
    return f"due:{stage}:{{{partition}}}"


def clock(partition: int) -> str:
    """Hash of event-time watermarks (ms) of one partition, one field a stage."""
    return f"clock:{{{partition}}}"


def anonymous_user(user_id: str) -> str:
    """Twelve hex digits that stand for a user in logs: equal ids stay equal, the id stays private."""
    return blake2b(user_id.encode("utf-8", "surrogatepass"), digest_size=6).hexdigest()
