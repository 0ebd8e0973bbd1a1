"""The vocabulary of contexts: what is learned, which token says it, and that the rest says nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.bundles import context
from registry.bundles.context import Context, context_fields, count_values, vocabulary
from streams.errors import SidstreamError

CONTEXT = Context(100, {"scene": ["home", "cart"], "profile.country": ["Japan", "France", "Peru"]})
names = st.sampled_from(["scene", "profile.a", "profile.b", "profile.c"])
values = st.text("xyz", min_size=1, max_size=2)
counts = st.dictionaries(names, st.dictionaries(values, st.integers(1, 6), max_size=8))


def test_each_known_value_has_a_token_in_its_fields_place_and_the_rest_is_padding() -> None:
    assert CONTEXT.row({"scene": "cart", "profile.country": "Peru"}) == [101, 104]
    assert CONTEXT.row({"profile.country": "Japan"}) == [0, 102]
    for fields in (
        {},
        {"scene": "Japan"},
        {"scene": ""},
        {"profile.segment": "home"},
        {"profile.country": "japan"},
    ):
        assert CONTEXT.row(fields) == [0, 0]
        assert CONTEXT.known_fields(fields) == {}
    assert Context().row({"scene": "home"}) == []
    assert CONTEXT.known_fields({"scene": "home", "profile.country": "Mars"}) == {"scene": "home"}


def test_a_request_says_its_scene_and_its_users_attributes() -> None:
    assert context_fields(None, None) == {}
    assert context_fields("home", {"scene": "s", "country": "Peru"}) == {
        "scene": "home", "profile.scene": "s", "profile.country": "Peru",
    }  # fmt: skip


def test_rows_of_events_are_those_of_their_scene_and_user() -> None:
    profiles = {"u": {"country": "Peru"}, "v": {"country": "Mars"}}
    found = CONTEXT.rows(["home", None, "cart", "nowhere"], ["u", "u", "v", "w"], profiles)
    assert found.tolist() == [[100, 104], [0, 104], [101, 0], [0, 0]]
    assert Context().rows([None], ["u"], profiles).shape == (1, 0)


def test_scenes_are_counted_by_events_and_attributes_by_users() -> None:
    found = count_values({"home": 7}, [{"a": "x", "b": "y"}, {"a": "x"}, {}])
    assert found == {"scene": {"home": 7}, "profile.a": {"x": 2}, "profile.b": {"y": 1}}


@given(counts, st.integers(1, 4), st.integers(1, 4), st.integers(0, 4))
def test_the_most_frequent_values_of_the_most_frequent_fields_are_learned(
    found: dict[str, dict[str, int]], least: int, most: int, fields: int
) -> None:
    made = vocabulary(found, 40, least, most, fields)
    assert len(made.fields) <= fields
    sums = []
    for name, learned in made.fields.items():
        order = sorted(found[name], key=lambda value: (-found[name][value], value))
        assert list(learned) == [value for value in order if found[name][value] >= least][:most]
        assert learned
        sums.append((-sum(found[name][value] for value in learned), name))
    assert sums == sorted(sums)
    tokens = [made.row({name: value}) for name, learned in made.fields.items() for value in learned]
    assert [sum(row) for row in tokens] == list(range(40, 40 + made.size))
    # In whatever order things were counted.
    backwards = {name: dict(reversed(found[name].items())) for name in reversed(found)}
    assert vocabulary(backwards, 40, least, most, fields) == made


def test_a_bundle_keeps_its_context_and_one_without_the_file_has_none(tmp_path: Path) -> None:
    context.write(Context(), tmp_path)
    assert not list(tmp_path.iterdir())
    assert context.read(tmp_path) == Context()
    context.write(CONTEXT, tmp_path)
    assert context.read(tmp_path) == CONTEXT
    for damaged in (b"{", b'{"first": 1}', b'{"first": 1, "fields": {"scene": [3]}}'):
        (tmp_path / context.CONTEXT).write_bytes(damaged)
        with pytest.raises(SidstreamError, match=r"context\.json is no context"):
            context.read(tmp_path)
