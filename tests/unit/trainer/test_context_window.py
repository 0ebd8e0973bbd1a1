"""What a window says of scenes and users, and which context a cycle works with."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.bundles import context as kept
from registry.bundles import rewards
from registry.bundles.context import Context
from registry.bundles.prompt import Prompt
from streams.events import CatalogItem, SidAssignment, UserProfile
from streams.settings import KafkaSettings
from tests.tiny_explorations import T0, exploration
from tests.tiny_log import NOBODY, Logged
from tests.tiny_shop import SIZES, sid_of
from trainer import cycle_inputs
from trainer.log.interaction_log import INTERACTIONS
from trainer.sequences.interactions import training_catalogue
from trainer.settings import TrainerSettings

BOOK = "c" * 16


def about(user: str, at: int, number: int = 0, **attributes: str) -> UserProfile:
    return UserProfile.new(user_id=user, ts=T0 + at, event_id=f"{user}-{at}-{number}", attributes=attributes)


@pytest.fixture
def logged(tmp_path: Path) -> Logged:
    return Logged(tmp_path)


def test_a_users_newest_profile_counts_until_it_is_deleted(logged: Logged) -> None:
    logged.events(
        about("u", 5, country="Peru"), about("v", 1, country="Japan"), about("u", 3, country="Mars")
    )
    logged.events(about("w", 1, country="France"))
    logged.tombstone("users", "v")
    assert logged.window().profiles() == {"u": {"country": "Peru"}, "w": {"country": "France"}}
    logged.events(about("u", 6), about("v", 0, country="Peru"))
    assert logged.window().profiles() == {"u": {}, "v": {"country": "Peru"}, "w": {"country": "France"}}


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=2, max_size=5, unique=True))
def test_in_any_order_the_same_profile_counts(
    tmp_path_factory: pytest.TempPathFactory, times: list[tuple[int, int]]
) -> None:
    profiles = [about("u", at, number, when=f"{at} {number}") for at, number in times]
    actual = []
    for order in itertools.islice(itertools.permutations(profiles), 6):
        logged = Logged(tmp_path_factory.mktemp("log"))
        logged.events(*order, order[0])
        actual.append(logged.window().profiles()["u"])
    assert all(one == actual[0] for one in actual)
    assert actual[0]["when"].split()[0] == str(max(at for at, _ in times))


def test_only_users_who_did_something_and_scenes_of_clicks_are_counted(logged: Logged) -> None:
    logged.events(
        about("u", 0, country="Peru"), about("v", 0, country="Peru"), about("idle", 0, country="Peru")
    )
    logged.clicks((None, "u", "i00", 1), (None, "u", "i01", 2), scene="home")
    logged.clicks((None, "x", "i00", 1))
    logged.purchases(("v", "i02", 3), ("u", "i02", 4))
    window = logged.window()
    assert window.context_counts(window.profiles(), NOBODY) == {
        "scene": {"home": 2},
        "profile.country": {"Peru": 2},
    }


def test_each_event_has_its_own_scene_and_its_users_profile(logged: Logged) -> None:
    catalogue = training_catalogue({f"i{n:02}": sid_of(n) for n in range(4)}, {}, Prompt(SIZES, 8))
    context = Context(50, {"scene": ["home", "cart"], "profile.country": ["Peru"]})
    logged.clicks((None, "u", "i00", 1), (None, "v", "i00", 5), scene="cart")
    logged.clicks((None, "u", "i01", 3))
    logged.clicks((None, "u", "i03", 4), scene="attic")
    logged.purchases(("u", "i02", 2))
    sequences = logged.window().user_sequences(
        catalogue, context, {"u": {"country": "Peru"}, "v": {"country": "Mars"}}
    )
    assert sequences.users == ["u", "v"]
    assert sequences.context.tolist() == [[51, 52], [0, 52], [0, 52], [0, 52], [51, 0]]
    assert logged.window().user_sequences(catalogue).context.shape == (5, 0)


def test_a_log_from_before_clicks_had_scenes_is_read_as_without(logged: Logged) -> None:
    old = pa.schema([column for column in INTERACTIONS if column.name != "scene"])
    row = [[0], [0], ["c"], ["u"], ["i00"], [T0 + 5], ["click"], [None]]
    arrays = [pa.array(column, kind.type) for column, kind in zip(row, old, strict=True)]
    logged.log.append("clicks", 1, {0: (0, 1)}, pa.table(arrays, schema=old), 0)
    logged.ends["clicks"] = 1
    logged.clicks((None, "u", "i01", 9), scene="home")
    window = logged.window()
    assert window.context_counts({}, NOBODY) == {"scene": {"home": 1}}
    catalogue = training_catalogue({f"i{n:02}": sid_of(n) for n in range(2)}, {}, Prompt(SIZES, 8))
    assert window.user_sequences(catalogue, Context(7, {"scene": ["home"]})).context.tolist() == [[0], [7]]


def read(
    logged: Logged, monkeypatch: pytest.MonkeyPatch, parent: Any = None, priced: bool = False, **context: int
) -> Any:
    """What a cycle on this log works with, going on from a parent or from nothing."""
    registry: Any = SimpleNamespace(
        codebook=lambda: SimpleNamespace(id=BOOK, sizes=SIZES),
        alias=lambda _: None if parent is None else "1",
        fetch=lambda _: parent,
        alignment_reference=lambda bundle: bundle,
    )
    chosen = TrainerSettings.model_validate(
        {
            "home": logged.log.folder,
            "context": context,
            "text_inputs": False,
            "validation_share": 0.0,
            "rewards": {"enabled": priced, "min_count": 3},
        }
    )
    window = logged.window()
    monkeypatch.setattr(cycle_inputs, "read_window", lambda *_args: window)
    inputs, _ = cycle_inputs.read_cycle_inputs(
        chosen, KafkaSettings(), registry, from_scratch=False, horizon_ms=0, window_ms=0,
        runs=chosen.home / "runs",
    )  # fmt: skip
    return inputs


def bundled(first: Any, tmp_path: Path) -> Any:
    """What a refresh reads of the bundle that was made from a material."""
    folder = tmp_path / "parent"
    (folder / "model").mkdir(parents=True)
    first.tokenizer.save_pretrained(folder / "model")
    kept.write(first.context, folder)
    rewards.write(first.rewards, folder)
    return SimpleNamespace(
        id="p",
        path=folder, model=folder / "model", prompt=Prompt(SIZES, 8),
        manifest=SimpleNamespace(codebook=BOOK, window={}),
    )  # fmt: skip


def test_a_model_from_scratch_learns_its_contexts_and_a_refresh_keeps_the_parents(
    logged: Logged, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for n in range(4):
        item = f"i{n:02}"
        logged.events(
            CatalogItem.new(item_id=item, title="a red thing", price=n, ts=T0),
            SidAssignment.new(item_id=item, sid=list(sid_of(n)), codebook=BOOK, ts=T0),
        )
    logged.clicks(*((None, f"u{n}", f"i{n % 4:02}", n) for n in range(6)), scene="home")
    logged.clicks((None, "u0", "i01", 9), scene="rare")
    logged.events(*(about(f"u{n}", n, country="Peru") for n in range(5)))
    first = read(logged, monkeypatch, min_count=5)
    assert first.context == Context(len(first.tokenizer), {"scene": ["home"], "profile.country": ["Peru"]})
    assert read(logged, monkeypatch, min_count=5, max_fields=0).context == Context(len(first.tokenizer), {})
    token = len(first.tokenizer)
    assert first.log.context[0].tolist() == [token, token + 1]
    # Without a profile, and in a scene that is too rare.
    assert first.log.context[first.log.starts[first.log.users.index("u5")]].tolist() == [token, 0]
    assert first.log.context[1].tolist() == [0, token + 1]

    # What comes later is said in the parent's words, or not at all.
    parent = bundled(first, tmp_path)
    logged.clicks(*((None, f"n{n}", f"i{n % 4:02}", 20 + n) for n in range(30)), scene="new")
    second = read(logged, monkeypatch, parent, min_count=5)
    assert second.context == first.context
    assert len(second.tokenizer) == len(first.tokenizer)
    (fresh,) = {tuple(row) for row in second.log.context[second.log.fresh].tolist()}
    assert fresh == (0, 0)


def test_rewards_are_made_with_a_model_from_scratch_and_a_refresh_keeps_their_bins(
    logged: Logged, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def listed(price: float) -> None:
        for n in range(4):
            logged.events(CatalogItem.new(item_id=f"i{n:02}", title="a thing", price=price * n, ts=T0))

    listed(1)
    for n in range(4):
        logged.events(SidAssignment.new(item_id=f"i{n:02}", sid=list(sid_of(n)), codebook=BOOK, ts=T0))
    logged.clicks(*((None, f"u{n}", f"i{n % 4:02}", n) for n in range(8)), scene="home")
    first = read(logged, monkeypatch, priced=True, min_count=5)
    token = len(first.tokenizer)
    bins = [str(value) for value in range(8)]
    either = ["0", "1"]
    fields = {"scene": ["home"], "reward.click": either, "reward.purchase": either, "reward.price": bins}
    assert first.context == Context(token, fields)
    assert list(first.rewards.mass) == ["price"]
    assert first.log.context[:4].tolist() == [[token]] * 4
    assert first.log.rewards[:4].tolist() == [[0, 0, token + 5 + value] for value in (0, 2, 5, 7)]
    assert first.negative_feedback is None

    parent = bundled(first, tmp_path)
    # Ten times as much is dear by the parent's bins. What is set now does not count.
    listed(10)
    second = read(logged, monkeypatch, parent, priced=False, min_count=5)
    assert (second.context, second.rewards) == (first.context, first.rewards)
    assert second.log.context[:4].tolist() == [[token]] * 4
    assert second.log.rewards[:4].tolist() == [[0, 0, token + 5 + value] for value in (0, 7, 7, 7)]

    # What is ignored and what is bought can be asked for once there is enough of either.
    ignored = {"ts": T0 + 20, "item_id": "i00", "context": {"scene": "home"}}
    logged.explorations(*(exploration(n, **ignored) for n in range(3)))
    logged.purchases(*((f"u{n}", f"i{n % 4:02}", 30) for n in range(3)))
    logged.clicks((None, "u9", "i01", 40))
    last = read(logged, monkeypatch, parent, min_count=5)
    sure = {"0": 0.0, "1": 1.0}
    assert last.rewards.mass == first.rewards.mass | {"click": sure, "purchase": sure}
    assert last.context == first.context
    assert set(last.log.rewards[:, 0].tolist()) == {token + 2}
    assert set(last.log.rewards[last.log.bought, 1].tolist()) == {token + 4}
    assert last.negative_feedback.targets.tolist() == [0, 0, 0]
    assert last.negative_feedback.items.tolist() == [2, 2, 2]
    assert last.negative_feedback.context.tolist() == [[token]] * 3
    assert last.negative_feedback.rewards.tolist() == [[token + 1, token + 3, token + 5]] * 3
