"""`sidstream evaluate`, what it writes, and what it refuses."""

import gzip
import json
import re

import numpy as np
import pytest
import torch
from scipy import stats
from typer.testing import CliRunner

from sidstream.cli import app
from streams.errors import SidstreamError
from tests.tiny_sequences import chains, sequences
from trainer.baselines.popularity import Popularity
from trainer.evaluation import datasets, report, results, splits
from trainer.evaluation.run import evaluate_ranker, with_means
from trainer.rankers import MODELS


def quiet(text):
    pass


class Ordered:
    """Lists the items in the order of their rows, from its seed on."""

    name = "ordered"
    head = "row"

    def fit(self, split, seed, progress):
        self.size, self.first = split.dataset.size, seed
        self.learned = []
        self.parameters = 7
        self.invalid_rate = 0.25

    def update(self, shard):
        self.learned.append([row.tolist() for row in shard.new_items])

    def rank(self, histories, k, mask):
        self.learned.append(len(histories))
        return np.tile((np.arange(k) + self.first) % self.size, (len(histories), 1))


def test_targets_are_counted_by_item_by_sid_and_apart_for_what_is_new():
    data = sequences([0, 1, 2, 3], [1, 0, 1, 1], [4, 5], sids=[[0], [3], [1], [2], [2], [2]])
    measured = evaluate_ranker(splits.leave_one_out(data), Ordered(), 0, ["none"], quiet)[0]
    assert measured.target_metrics["HR@1"].tolist() == [0, 0]
    assert measured.target_metrics["NDCG@5"][0] == pytest.approx(
        1 / np.log2(5)
    )  # item 3 is at the fourth place
    assert measured.target_metrics["MRR@20 by SID"].tolist() == [1 / 4, 1 / 2]
    # Item 3 is not in training, item 1 is.
    assert np.isnan(measured.target_metrics["HR@10, new items"]).tolist() == [False, True]
    assert "HR@10, new users" not in measured.target_metrics
    assert measured.run_metrics["parameters"] == 7
    assert measured.run_metrics["invalid rate"] == 0.25
    lines = {line["metric"]: line for line in report.lines([measured], "d", "leave-one-out", "c")}
    assert lines["HR@10, new items"]["value"] == 1
    assert lines["targets, new items"]["value"] == 1
    assert lines["targets"]["value"] == 2
    assert lines["NDCG@5"]["low"] <= lines["NDCG@5"]["value"] <= lines["NDCG@5"]["high"]
    assert lines["NDCG@5"]["head"] == "row"
    assert lines["NDCG@5"]["mask"] == "none"


def test_seeds_are_followed_by_their_mean():
    split = splits.leave_one_out(chains())
    runs = [
        run for seed in (1, 2) for run in evaluate_ranker(split, Ordered(), seed, ["none", "seen"], quiet)
    ]
    result = with_means(runs)
    assert [(run.seed, run.mask) for run in result] == [
        (1, "none"), (2, "none"), (None, "none"), (1, "seen"), (2, "seen"), (None, "seen"),
    ]  # fmt: skip
    one, two, mean = result[:3]
    assert (
        mean.target_metrics["HR@5"] == (one.target_metrics["HR@5"] + two.target_metrics["HR@5"]) / 2
    ).all()
    assert report.table(report.lines(result, "d", "p", "c"))[1][3] == "mean of 2"


def test_the_interval_of_a_mean_has_the_spread_of_the_seeds_in_it():
    split = splits.leave_one_out(chains())
    runs = [run for seed in (1, 4, 9) for run in evaluate_ranker(split, Ordered(), seed, ["none"], quiet)]
    runs += evaluate_ranker(split, Popularity(), 1, ["none"], quiet)
    means = [run.target_metrics["HR@5"].mean() for run in runs[:3]]
    assert np.std(means) > 0
    measured = with_means(runs)
    lines = {line["metric"]: line for line in report.lines(measured, "d", "p", "c") if line["seed"] is None}
    figure = lines["HR@5"]
    assert figure["value"] == pytest.approx(np.mean(means), rel=1e-4)
    # Three seeds bound a mean by t_2 = 4.3 standard errors of theirs at least, as far as it can be below 0.
    margin = stats.t.ppf(0.975, 2) * np.std(means, ddof=1) / 3**0.5
    assert figure["high"] - figure["value"] > 0.7 * margin
    assert figure["low"] >= 0
    changes = {line["metric"]: line for line in report.compared(measured, "popularity", "d", "p", "c")}
    change = changes["HR@5 minus popularity"]
    assert change["high"] - change["value"] > 0.7 * margin
    assert change["value"] == pytest.approx(np.mean(means) - runs[3].target_metrics["HR@5"].mean(), rel=1e-3)


def test_prequential_scores_a_shard_before_it_is_learned():
    data = chains()
    split = splits.split_by_time(data, 200, 400)
    ranker = Ordered()
    measured = evaluate_ranker(split, ranker, 0, ["none"], quiet, shard_count=3)[0]
    assert len(measured.users) == len(split.test)
    shards = list(splits.time_shards(data, 400, 3))
    # First the cost of an answer is taken, of at most half of the targets.
    expected = [
        (len(split.test) + 1) // 2,
        [row.tolist() for row in splits.shard_between(data, 200, 400).new_items],
    ]
    for shard in shards:
        expected += [len(shard.queries), [row.tolist() for row in shard.new_items]]
    assert ranker.learned == expected
    with pytest.raises(SidstreamError, match="give --split time"):
        evaluate_ranker(splits.leave_one_out(data), ranker, 0, ["none"], quiet, shard_count=3)


def test_a_model_is_compared_over_the_same_users():
    split = splits.leave_one_out(chains())
    runs = [
        *evaluate_ranker(split, Ordered(), 0, ["none"], quiet),
        *evaluate_ranker(split, Popularity(), 0, ["none"], quiet),
    ]
    result = {line["metric"]: line for line in report.compared(runs, "popularity", "d", "p", "c")}
    expected = (runs[0].target_metrics["HR@10"] - runs[1].target_metrics["HR@10"]).mean()
    assert result["HR@10 minus popularity"]["value"] == pytest.approx(expected, rel=1e-4)
    assert {line["model"] for line in result.values()} == {"ordered"}


def published(rows, model="m", value=0.5):
    line = results.line("accuracy, time", "d", model, "HR@10", value, 1, "c", 0.4, 0.6, mask="none")
    return [*rows, line | {"head": "h"}]


def test_publishing_replaces_what_was_measured_again_and_keeps_the_rest(tmp_path):
    page = tmp_path / "evaluation.md"
    page.write_text(f"before\n{report.BEGIN}old\n{report.END}after\n")
    report.publish(published(published([]), "other", 0.1), tmp_path)
    report.publish(published([], "m", 0.7), tmp_path)
    lines = [json.loads(text) for text in (tmp_path / "evaluation.jsonl").read_text().splitlines()]
    assert {(line["model"], line["value"]) for line in lines} == {("m", 0.7), ("other", 0.1)}
    text = page.read_text()
    assert "| m | h | none | 1 | 0.7000 (0.4000 to 0.6000) |" in text
    assert "0.5000" not in text
    assert "old" not in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")


def test_there_is_nothing_to_publish_into_outside_of_a_checkout(tmp_path):
    with pytest.raises(SidstreamError, match="in a checkout only"):
        report.publish(published([]), tmp_path)
    assert not (tmp_path / "evaluation.jsonl").exists()


@pytest.fixture
def amazon(tmp_path):
    """A folder that has a small Beauty, gzipped."""
    folder = tmp_path / "amazon14_beauty"
    folder.mkdir()
    random = np.random.default_rng(1)
    with gzip.open(folder / "user_sequence.txt.gz", "wt") as file:
        for user in range(20):
            file.write(f"U{user} {' '.join(f'A{item}' for item in random.permutation(9)[:5])}\n")
    with gzip.open(folder / "item_text.txt.gz", "wt") as file:
        file.writelines(f"A{item} red nail polish\n" for item in range(9))
    return tmp_path


def test_the_command_prints_a_table_or_a_line_and_writes_lines(amazon, tmp_path, monkeypatch):
    monkeypatch.delenv("SIDSTREAM_TRAINER__ARITHMETIC", raising=False)
    words = ["evaluate", "amazon14-beauty", "--models", "popularity,itemknn", "--data", str(amazon)]
    table = CliRunner().invoke(app, words)
    assert table.exit_code == 0
    assert "amazon14-beauty, leave-one-out: 20 targets among 9 items" in table.output
    assert "itemknn     similarity  seen" in table.output
    out = tmp_path / "lines.jsonl"
    result = CliRunner().invoke(
        app, [*words, "--mask", "seen", "--json", "--out", str(out), "--against", "popularity"]
    )
    output = json.loads(result.stdout.splitlines()[-1])
    lines = [json.loads(text) for text in out.read_text().splitlines()]
    assert output["lines"] == lines
    assert {line["mask"] for line in lines} == {"seen"}
    assert any(line["metric"] == "HR@10 minus popularity" for line in lines)
    # A command that anybody can repeat names no folder of this machine.
    assert {line["command"] for line in lines} == {
        "sidstream evaluate amazon14-beauty --models popularity,itemknn --seeds 1 --mask seen "
        "--split leave-one-out"
    }


def test_the_budget_and_the_chosen_settings_of_a_table_are_in_its_command_and_heading(amazon, monkeypatch):
    used = []
    monkeypatch.setitem(MODELS, "sasrec", lambda options: used.append(options) or Popularity())
    words = ["evaluate", "amazon14-beauty", "--models", "sasrec", "--data", str(amazon), "--json"]
    result = CliRunner().invoke(app, [*words, "--cpu-seconds", "40", "--chosen-settings"])
    lines = json.loads(result.stdout.splitlines()[-1])["lines"]
    assert [(options.cpu_seconds, options.chosen_for) for options in used] == [(40.0, "amazon14-beauty")]
    assert all(" --cpu-seconds 40 --chosen-settings" in line["command"] for line in lines)
    # Figures of another budget stand in a chapter of their own, and do not take the place of these.
    assert {line["claim"] for line in lines} == {"accuracy, leave-one-out, 40 CPU seconds a training"}
    assert any(line["metric"] == "CPU seconds of training" for line in lines)


def test_a_draw_of_targets_is_the_same_for_every_model_and_is_named(amazon):
    words = ["evaluate", "amazon14-beauty", "--models", "popularity,itemknn", "--data", str(amazon), "--json"]
    result = CliRunner().invoke(app, [*words, "--targets", "7", "--against", "popularity"])
    lines = json.loads(result.stdout.splitlines()[-1])["lines"]
    assert {line["value"] for line in lines if line["metric"] == "targets"} == {7}
    assert {line["claim"] for line in lines} == {"accuracy, leave-one-out, 7 targets"}
    assert all(line["command"].endswith(" --targets 7") for line in lines)
    everything = CliRunner().invoke(app, [*words, "--targets", "99"])
    assert '"value": 20.0' in everything.stdout
    refused = CliRunner().invoke(app, [*words, "--targets", "7", "--shards", "2", "--split", "leave-one-out"])
    assert "leave out --shards" in str(refused.exception)


@pytest.mark.parametrize("switch", [True, False])
def test_the_arithmetic_of_a_table_is_in_its_command_and_with_every_figure(amazon, monkeypatch, switch):
    used = []
    monkeypatch.setitem(MODELS, "sasrec", lambda options: used.append(options.arithmetic) or Popularity())
    words = ["evaluate", "amazon14-beauty", "--models", "sasrec", "--data", str(amazon), "--json"]
    # The switch wins over the setting.
    monkeypatch.setenv("SIDSTREAM_TRAINER__ARITHMETIC", "bfloat16" if switch else "float32")
    result = CliRunner().invoke(app, [*words, "--arithmetic", "float32"] if switch else words)
    lines = json.loads(result.stdout.splitlines()[-1])["lines"]
    assert used == ["float32"]
    assert all(line["command"].endswith(" --arithmetic float32") for line in lines)
    assert {line["machine"] for line in lines} == {results.machine("float32")}


def test_a_figure_names_its_processor_and_how_it_computes():
    parts = results.machine("bfloat16").split(", ")
    assert parts[0]
    assert parts[-3:] == [
        torch.backends.cpu.get_cpu_capability(), f"{torch.get_num_threads()} threads", "bfloat16",
    ]  # fmt: skip
    assert results.machine("float32").endswith(", float32")


@pytest.mark.parametrize(
    ("words", "expected_text"),
    [
        (
            ["amazon14-toys"],
            "amazon14-toys is not in .*: name the folder that has amazon14_toys/user_sequence.txt",
        ),
        (["nowhere"], "there is no data set 'nowhere': give one of amazon14-beauty"),
        (["amazon14-beauty", "--models", "x"], "there is no model 'x': give one or more of popularity"),
        (["amazon14-beauty", "--mask", "all"], "--mask is 'all': give none, seen or both"),
        (["amazon14-beauty", "--arithmetic", "int8"], "--arithmetic is 'int8': give auto, float32, bfloat16"),
        (["amazon14-beauty", "--split", "half"], "--split is 'half': give leave-one-out or time"),
        (["amazon14-beauty", "--split", "time"], "has no times: give --split leave-one-out"),
        (["amazon14-beauty", "--against", "sasrec", "--models", "itemknn"], "--against is 'sasrec'"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_one_line(amazon, words, expected_text):
    result = CliRunner().invoke(app, ["evaluate", *words, "--data", str(amazon)])
    assert result.exit_code == 1
    assert isinstance(result.exception, SidstreamError)
    assert re.search(expected_text, str(result.exception))


def test_without_a_folder_the_error_says_how_to_name_one(monkeypatch):
    monkeypatch.delenv("SIDSTREAM_DATA", raising=False)
    with pytest.raises(SidstreamError, match=r"does not ship with sidstream: name the folder .* --data"):
        datasets.load_dataset("tmall2014")


def test_a_model_that_looks_at_users_is_told_whose_histories_it_ranks():
    class Knowing(Ordered):
        def rank_for(self, users, histories, k, mask):
            return np.tile((users[:, None] + np.arange(k)) % self.size, 1)

    split = splits.split_by_time(chains(), 200, 400)
    measured = evaluate_ranker(split, Knowing(), 0, ["none"], quiet)[0]
    expected = [
        user % 16 == target for user, target in zip(split.test.users, split.test.targets, strict=True)
    ]
    assert measured.target_metrics["HR@1"].tolist() == expected


def test_what_one_seed_was_measured_for_stands_beside_the_means():
    line = {"model": "m", "head": "dense", "mask": "none", "low": None, "high": None}
    rows = [line | {"seed": seed, "metric": "HR@10", "value": 0.1 * seed} for seed in (1, 2)]
    rows += [line | {"seed": 1, "metric": "ms per answer", "value": 3.0}]
    rows += [line | {"seed": None, "metric": "HR@10", "value": 0.15}]
    headings, cells = report.table(rows)
    assert dict(zip(headings, cells, strict=True)) == {
        "model": "m", "ordered by": "dense", "mask": "none", "seed": "mean of 2", "HR@10": "0.1500",
        "ms/answer": "3.00",
    }  # fmt: skip
