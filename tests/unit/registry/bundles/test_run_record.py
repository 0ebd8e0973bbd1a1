"""Nested settings and figures as MLflow's flat parameters and metrics."""

from __future__ import annotations

from registry.bundles.run_record import MAX_PARAM_LENGTH, flat_metrics, flat_params
from tests.tiny_shop import ITEMS, SIZES, sid_of
from trainer.codebooks.report import codebook_report
from trainer.settings import TrainerSettings


def test_every_setting_of_training_is_a_parameter() -> None:
    settings = TrainerSettings.model_validate({"dpo": {"beta": 0.3}, "max_seconds": None})
    params = flat_params(settings.model_dump(mode="json"))
    assert params["dpo.beta"] == "0.3"
    assert params["rewards.online.rounds"] == "0"
    assert params["dpo.schemes"] == '["purchased_over_shown", "clicked_over_shown"]'
    assert params["max_seconds"] == ""
    assert {name.partition(".")[0] for name in params} == set(TrainerSettings.model_fields)


def test_a_value_too_long_for_mlflow_says_that_it_is_cut() -> None:
    params = flat_params({"short": "x" * MAX_PARAM_LENGTH, "long": "x" * (MAX_PARAM_LENGTH + 1)})
    assert params["short"] == "x" * MAX_PARAM_LENGTH
    assert len(params["long"]) == MAX_PARAM_LENGTH
    assert params["long"].endswith("x...")


def test_the_figures_of_a_codebook_are_metrics_and_what_was_not_measured_is_left_out() -> None:
    from tests.tiny_bundle import tiny_codebook

    report = codebook_report(tiny_codebook(SIZES), [sid_of(item) for item in range(ITEMS)])
    metrics = flat_metrics(report.as_dict())
    assert metrics["items"] == ITEMS
    assert metrics["levels/1/used"] == 4
    assert metrics["levels/3/size"] == 5
    assert 0 <= metrics["levels/2/gini"] <= 1
    assert not [name for name in metrics if name.startswith(("greedy", "codebook"))]
    assert flat_metrics({"a": float("nan"), "b": [1, {"c": 2}]}) == {"b/1": 1.0, "b/2/c": 2.0}
