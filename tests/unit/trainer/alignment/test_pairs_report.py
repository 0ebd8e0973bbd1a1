"""The report of preference pairs: each pair counts once, and every figure is what its name says."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from sidstream.cli import app
from streams.errors import SidstreamError
from streams.events import PreferencePair, Scheme
from tests.tiny_explorations import T0
from tests.tiny_log import Logged
from trainer.alignment.pairs_plot import draw_pairs_report
from trainer.alignment.pairs_report import pairs_report
from trainer.log.pair_filter import FilteredPairs

SIDS = {"a": [0, 0, 0], "b": [0, 0, 1], "c": [0, 1, 0], "d": [1, 1, 0], "e": [1, 1, 1]}


def pair(
    chosen: str, rejected: Iterable[str], ts: int = 0, user: str = "u",
    scheme: Scheme = "purchased_over_clicked", history: int = 0,
) -> PreferencePair:  # fmt: skip
    rejected = list(rejected)
    return PreferencePair.new(
        event_id=f"{chosen}{rejected}{ts}{user}{scheme}", ts=T0 + ts, user_id=user, scheme=scheme,
        codebook="book", chosen_item=chosen, chosen=SIDS[chosen], rejected_items=rejected,
        rejected=[SIDS[item] for item in rejected], history=[[0, 0, 0]] * history,
    )  # fmt: skip


def test_a_pair_counts_once_in_its_scheme_and_codebook() -> None:
    pairs = [pair("a", "bc", user="v"), pair("a", "d", 5), pair("e", "d", 9, scheme="clicked_over_shown")]
    report = pairs_report([*pairs, pairs[0], pairs[0]], T0 + 10)
    assert (report.pairs, report.repeats, report.users) == (3, 2, 2)
    assert [(group.scheme, group.codebook, group.pairs, group.users) for group in report.groups] == [
        ("purchased_over_clicked", "book", 2, 2),
        ("clicked_over_shown", "book", 1, 1),
    ]
    assert (report.age_ms.newest, report.age_ms.median, report.age_ms.oldest) == (1, 5, 10)
    counts = report.timeline.counts
    assert {scheme: sum(spans) for scheme, spans in counts.items()} == {
        "purchased_over_clicked": 2, "clicked_over_shown": 1,
    }  # fmt: skip
    assert (counts["purchased_over_clicked"][0], counts["clicked_over_shown"][-1]) == (1, 1)


def test_shared_prefixes_are_shares_of_rejected_sids() -> None:
    (group,) = pairs_report([pair("a", "bcd"), pair("a", "b", 1)], T0).groups
    # Of b, c, d and b, against a: three share the first code, two also the second, none all.
    assert group.shared == (0.75, 0.5, 0.0)
    assert (group.rejected.mean, group.rejected.median, group.rejected.most) == (2, 2, 3)


def test_items_on_both_sides_are_told_from_either() -> None:
    report = pairs_report([pair("a", "bc"), pair("b", "d", 1), pair("a", "d", 2), pair("e", "d", 3)], T0)
    assert (report.chosen_items, report.rejected_items) == (3, 3)
    assert (report.chosen_also_rejected, report.rejected_also_chosen) == (pytest.approx(1 / 3),) * 2
    assert report.top == (("a", 2), ("b", 1), ("e", 1))
    assert report.gini == pytest.approx(1 / 6)  # of 1, 1 and 2


items = st.sampled_from("abcde")
schemes = st.sampled_from(["purchased_over_clicked", "purchased_over_shown", "clicked_over_shown"])
pairs = st.builds(
    pair, items, st.lists(items, min_size=1, max_size=4), st.integers(0, 99), st.sampled_from("uv"), schemes,
    st.integers(0, 5),
)  # fmt: skip


@given(drawn_pairs=st.lists(pairs, min_size=1, max_size=12), data=st.data())
@settings(max_examples=100, deadline=None)
def test_order_and_repeats_change_nothing_but_their_number(drawn_pairs: Any, data: Any) -> None:
    once = list({entry.event_id: entry for entry in drawn_pairs}.values())
    repeated = data.draw(st.permutations([*once, *data.draw(st.lists(st.sampled_from(once), max_size=5))]))
    first, second = (pairs_report(of, T0 + 100).as_dict() for of in (once, repeated))
    assert (first.pop("repeats"), second.pop("repeats")) == (0, len(repeated) - len(once))
    assert first == second
    assert sum(entry["pairs"] for entry in first["groups"]) == first["pairs"] == len(once)
    for entry in first["groups"]:
        assert entry["shared"] == sorted(entry["shared"], reverse=True)
        assert all(0 <= share <= 1 for share in entry["shared"])
        assert entry["rejected"]["median"] <= entry["rejected"]["p90"] <= entry["rejected"]["most"]
    assert 0 <= first["gini"] < 1


def test_no_pairs_are_an_error_that_says_where_pairs_come_from() -> None:
    with pytest.raises(SidstreamError, match=r"no preference pairs.*sidstream agents"):
        pairs_report([], T0)


def test_pictures_are_drawn_of_few_pairs_and_of_several_schemes() -> None:
    for pairs in ([pair("a", "b")], [pair("a", "bc"), pair("d", "e", 50, scheme="clicked_over_shown")]):
        drawn = draw_pairs_report(pairs_report(pairs, T0 + 100))
        assert set(drawn) == {"pairs-over-time.png", "shared-prefixes.png", "ages.png"}
        assert all(content.startswith(b"\x89PNG") for content in drawn.values())


def test_the_command_tells_draws_and_withdraws_by_the_trainers_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [pair("a", "bc"), pair("d", "e", 50), pair("d", "e", 50)]
    monkeypatch.setattr(
        "streams.wire.topic_reader.read_events", lambda kafka, kind: [("u", event) for event in pairs]
    )
    monkeypatch.setenv("SIDSTREAM_TRAINER__HOME", str(tmp_path))
    text = CliRunner().invoke(app, ["pairs", "report"]).stdout
    assert "2 pairs of 1 users, 1 repeats left out" in text
    assert "withdrawn: not measured" in text
    Logged(tmp_path / "log").purchases(("u", "e", 60))
    arguments = ["pairs", "report", "--json", "--plots", str(tmp_path / "plots")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["withdrawn"] == {"bought": 1, "clicked": 0, "same": 0, "gone": 1}
    assert "timeline" not in report
    assert len(list((tmp_path / "plots").glob("*.png"))) == 3
    text = CliRunner().invoke(app, arguments[:2]).stdout
    assert "withdrawn by the trainer's log: 1 rejected items that were bought" in text
    (tmp_path / "file").write_text("")
    refused = CliRunner().invoke(app, ["pairs", "report", "--plots", str(tmp_path / "file")])
    assert isinstance(refused.exception, SidstreamError)
    assert "--plots" in str(refused.exception)


def test_what_was_withdrawn_is_in_the_report_where_it_was_measured() -> None:
    pairs = [pair("a", "b")]
    assert pairs_report(pairs, T0).as_dict()["withdrawn"] is None
    filtered = FilteredPairs([], repeats=0, bought=1, clicked=2, equal_to_chosen=3, without_rejected=4)
    assert pairs_report(pairs, T0, filtered).as_dict()["withdrawn"] == {
        "bought": 1, "clicked": 2, "same": 3, "gone": 4,
    }  # fmt: skip
