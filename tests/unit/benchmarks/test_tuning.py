"""The search for settings: as many trials for each family, the best on validation, nothing measured twice."""

import json

import pytest

from benchmarks.tuning import KNOWN, SEED, SPACES, is_trial, publish, trial_settings
from registry.settings import CodebookSettings
from trainer.baselines.sasrec import SasRec, SasRecSettings
from trainer.evaluation.generator_ranker import GeneratorRanker
from trainer.evaluation.results import line
from trainer.evaluation.validation import VALIDATION_USERS
from trainer.rankers import MODELS, Options, chosen_settings
from trainer.settings import TrainerSettings


@pytest.mark.parametrize("family", SPACES)
@pytest.mark.parametrize("trials", [1, 2, 5])
def test_each_family_has_as_many_trials_the_same_at_each_call_and_known_ones_first(family, trials):
    settings = list(trial_settings(family, trials))
    assert len(settings) == trials
    assert settings == list(trial_settings(family, trials))
    assert settings[: len(KNOWN[family])] == KNOWN[family][:trials]
    assert list(trial_settings(family, trials + 2))[:trials] == settings
    assert json.loads(json.dumps(settings)) == settings


@pytest.mark.parametrize("family", SPACES)
def test_every_trial_is_a_setting_that_can_be_trained(family):
    for settings in trial_settings(family, 12):
        if family == "sidstream":
            TrainerSettings.model_validate(settings["trainer"])
            CodebookSettings.model_validate(settings["codebook"])
            # The budget of the search decides, and the same validation for all.
            assert settings["trainer"]["validation_users"] == VALIDATION_USERS
        else:
            SasRec(SasRecSettings(**settings))


def trial(number, value, settings, cpu_seconds=30.0, family="sasrec", dataset="d"):
    row = line("search, time", dataset, family, "validation NDCG@10", value, SEED, "c")
    return row | {"trial": number, "settings": settings, "cpu_seconds": cpu_seconds}


def test_the_best_trial_of_a_budget_is_chosen_and_another_budget_begins_anew(tmp_path):
    (tmp_path / "tuning.md").write_text("before\n<!-- table -->\n<!-- end -->\nafter\n")
    chosen = tmp_path / "chosen.json"

    def lines():
        return [json.loads(text) for text in (tmp_path / "tuning.jsonl").read_text().splitlines()]

    publish(trial(1, 0.2, {"lr": 1}), tmp_path, chosen)
    publish(trial(2, 0.3, {"lr": 2}), tmp_path, chosen)
    publish(trial(3, 0.1, {"lr": 3}), tmp_path, chosen)
    publish(trial(1, 0.9, {"lr": 9}, family="gsasrec"), tmp_path, chosen)
    assert json.loads(chosen.read_text()) == {"d": {"gsasrec": {"lr": 9}, "sasrec": {"lr": 2}}}
    assert len(lines()) == 4
    assert '| d | sasrec | 2 | 30 | 0.3000 | yes | `{"lr": 2}` |' in (tmp_path / "tuning.md").read_text()
    # A trial again takes the place of the first; trials of another budget do not compare with these.
    publish(trial(2, 0.15, {"lr": 2}), tmp_path, chosen)
    assert json.loads(chosen.read_text())["d"]["sasrec"] == {"lr": 1}
    publish(trial(1, 0.05, {"lr": 1}, cpu_seconds=60.0), tmp_path, chosen)
    assert {(row["model"], row["cpu_seconds"]) for row in lines()} == {("gsasrec", 30.0), ("sasrec", 60.0)}


def test_a_published_trial_is_known_again_by_its_settings_and_budget():
    row = trial(1, 0.2, {"lr": 1})
    assert is_trial(row, "d", "sasrec", {"trial": 1, "settings": {"lr": 1}, "cpu_seconds": 30.0})
    for other in (
        {"trial": 2, "settings": {"lr": 1}, "cpu_seconds": 30.0},
        {"trial": 1, "settings": {"lr": 2}, "cpu_seconds": 30.0},
        {"trial": 1, "settings": {"lr": 1}, "cpu_seconds": 60.0},
    ):
        assert not is_trial(row, "d", "sasrec", other)
    assert not is_trial(row, "d", "gsasrec", {"trial": 1, "settings": {"lr": 1}, "cpu_seconds": 30.0})


def test_chosen_settings_reach_the_model_and_missing_ones_name_the_search(tmp_path, monkeypatch):
    file = tmp_path / "chosen.json"
    monkeypatch.setattr("trainer.rankers.CHOSEN_SETTINGS", file)
    with pytest.raises(Exception, match=r"no settings of sasrec were chosen on d: .*benchmarks.tuning d"):
        chosen_settings("d", "sasrec")
    trained = {"trainer": {"width": 16}, "codebook": {"levels": 2}}
    chosen = {"sasrec": {"lr": 0.5}, "gsasrec": {"negatives": 3}, "sidstream": trained}
    file.write_text(json.dumps({"d": chosen}))
    options = Options(cpu_seconds=12.0, chosen_for="d")
    sasrec, gsasrec = MODELS["sasrec"](options), MODELS["gsasrec"](options)
    assert (sasrec.settings.lr, sasrec.settings.loss, sasrec.settings.cpu_seconds) == (0.5, "softmax", 12.0)
    assert (gsasrec.settings.negatives, gsasrec.settings.loss) == (3, "gbce")
    ours = MODELS["sidstream-mixed"](options)
    assert isinstance(ours, GeneratorRanker)
    assert ours.trained.recipe.trainer["width"] == 16
    assert ours.trained.recipe.cpu_seconds == 12.0
