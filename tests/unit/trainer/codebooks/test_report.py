import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from registry.bundles.codebook import Codebook
from sidstream.cli import app
from streams.errors import SidstreamError
from trainer.codebooks.codes_plot import draw_codebook_report
from trainer.codebooks.report import code_spread, codebook_report, nearest_codes


def book():
    """Two levels of two codes on the axes of a plane, unscaled: every distance can be told by hand."""
    return Codebook(
        "test",
        (np.array([[4, 0], [-4, 0]], np.float32), np.array([[0, 1], [0, -1]], np.float32)),
        scaled=False,
    )


def test_collisions_are_told_in_all_three_ways():
    vectors = np.array([[4, 1]] * 3 + [[4, -1]] * 2 + [[-4, 1]], np.float32)
    own = np.array([[0, 0], [0, 1], [1, 0], [1, 1], [0, 0], [1, 0]])
    figures = nearest_codes(book(), vectors, own)
    assert figures.collision_rate == pytest.approx(3 / 6)
    assert figures.collided == pytest.approx(5 / 6)
    assert figures.largest_group == 3
    assert figures.p99_group == pytest.approx(2.98)
    assert figures.moved == pytest.approx(4 / 6)


def test_the_error_is_the_squared_distance_over_the_spread():
    vectors = np.array([[4, 2], [-4, -1]], np.float32)
    figures = nearest_codes(book(), vectors, np.array([[0, 1], [1, 1]]))
    # One vector is 1 away from its code, the other not at all; each is half of (8, 3) from their mean.
    assert figures.error == pytest.approx(0.5 / (73 / 4))
    # With its own slot the first is 3 away.
    assert figures.moved_error == pytest.approx((9 / 2) / (73 / 4))


def test_a_scaled_residual_takes_its_length_along():
    scaled = Codebook("test", book().centroids)
    vectors = np.array([[4, 0.5], [-4, -0.5]], np.float32)
    # (0, .5) is scaled to (0, 1), which the second code is: nothing is left.
    figures = nearest_codes(scaled, vectors, np.array([[0, 1], [1, 0]]))
    assert figures.error == pytest.approx(0)
    # The other code is 2 away from (0, 1), which is half as long in truth.
    assert figures.moved_error == pytest.approx(1 / 16.25)
    assert nearest_codes(book(), vectors, np.array([[0, 0], [1, 1]])).error == pytest.approx(0.25 / 16.25)


def test_evenness_at_its_two_ends():
    even = code_spread(np.arange(8), 8)
    assert (even.used, even.gini, even.perplexity) == (8, pytest.approx(0), pytest.approx(8))
    single_code = code_spread(np.zeros(5, np.int64), 8)
    assert (single_code.used, single_code.gini, single_code.perplexity) == (
        1,
        pytest.approx(7 / 8),
        pytest.approx(1),
    )


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=60))
def test_gini_is_the_mean_difference_of_two_codes_over_twice_the_mean(codes):
    counts = np.bincount(codes, minlength=7).astype(float)
    pairs = np.abs(counts[:, None] - counts[None]).mean() / (2 * counts.mean())
    level_spread = code_spread(np.array(codes), 7)
    assert level_spread.gini == pytest.approx(pairs)
    share = counts[counts > 0] / counts.sum()
    assert math.log(level_spread.perplexity) == pytest.approx(-(share * np.log(share)).sum())


def test_neighbours_and_items_touched_together_are_held_against_chance():
    vectors = np.array([[1, 0], [0.99, 0.01], [0, 1], [0.01, 0.99]], np.float32)
    sids = [(0, 0), (0, 1), (1, 0), (1, 1)]
    report = codebook_report(book(), sids, vectors, [np.array([0, 2]), np.array([1, 3]), np.array([0, 1])])
    assert (report.neighbours.first, report.neighbours.two, report.neighbours.chance) == (1, 0, 0.5)
    # 0 was next to 2 and 1 equally often (2 is not of its code), 2 to 0, 3 to 1.
    assert report.together.items == 4
    assert report.together.first <= 0.5
    assert codebook_report(book(), sids, vectors).together is None
    assert codebook_report(book(), sids).greedy is None


def test_room_is_the_last_level_over_the_fullest_prefix():
    axes = np.eye(3, dtype=np.float32)
    report = codebook_report(Codebook("test", (axes[:2], axes)), [(0, 0), (0, 2), (1, 0)])
    assert (report.prefixes, report.largest_prefix, report.headroom) == (2, 2, 1.5)


def test_the_command_measures_a_file_of_items_and_draws(tmp_path, monkeypatch):
    monkeypatch.setenv("SIDSTREAM_REGISTRY__CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SIDSTREAM_CODEBOOK__SIZE", "4")
    items = tmp_path / "items.jsonl"
    colours, things = ["red", "blue", "green", "white"], ["lamp", "mug", "box", "lantern", "towel"]
    base = {"schema_version": 1, "ts": 1767225600000}
    rows = [
        base | {"event_id": f"c{n}", "item_id": f"i{n}", "title": title}
        for n, title in enumerate(f"{colour} {thing}" for colour in colours for thing in things)
    ]
    items.write_text("\n".join(map(json.dumps, rows)))
    arguments = ["sids", "report", "--catalogue", str(items), "--json", "--plot", str(tmp_path / "sids.png")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout.splitlines()[-1])
    assert (report["items"], [level["size"] for level in report["levels"]]) == (20, [4, 4, 16])
    assert 0 < report["greedy"]["error"] < report["greedy"]["moved_error"] + 1e-9 < 1
    assert (tmp_path / "sids.png").read_bytes().startswith(b"\x89PNG")
    text = CliRunner().invoke(app, arguments[:4]).stdout
    assert report["codebook"] in text
    assert "20 items" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--codebook", __file__], "--catalogue"),
        (["--dataset", "amazon14-beauty", "--catalogue", __file__], "give one of them"),
        (["--catalogue", "absent.jsonl"], "absent.jsonl"),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_sentence(arguments, message):
    done = CliRunner().invoke(app, ["sids", "report", *arguments])
    assert isinstance(done.exception, SidstreamError)
    assert message in str(done.exception)


def test_a_picture_shows_shares_only_where_they_were_measured():
    assert draw_codebook_report(codebook_report(book(), [(0, 0), (1, 1)])).startswith(b"\x89PNG")


def test_data_sets_are_looked_for_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("SIDSTREAM_DATA", str(tmp_path / "empty"))
    done = CliRunner().invoke(app, ["sids", "report", "--dataset", "amazon14-beauty"])
    assert done.exit_code != 0
    assert str(tmp_path / "empty") in str(done.exception)
