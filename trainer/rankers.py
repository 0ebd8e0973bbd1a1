"""The models that can be evaluated, by name. Each is imported only when it is asked for: some need torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from streams.errors import SidstreamError
from trainer.evaluation.ranker import Head, Ranker
from trainer.settings import Arithmetic


class Options(NamedTuple):
    """What a run asks of a model that is trained."""

    cpu_seconds: float | None = None  # budget of a training on the processor; None: until it stops by itself
    epochs: int | None = None  # passes over the training part, at most; None: the model's own
    arithmetic: Arithmetic = "auto"  # of matrix products in training
    chosen_for: str | None = None  # the data set whose chosen settings are used; None: each model's own


Factory = Callable[[Options], Ranker]
# By which settings the generator is trained: those of Amazon Beauty, or the chosen ones of a data set; those
# of Beauty for several that are merged; the defaults; or the defaults without what is known of users.
Kind = Literal["tuned", "merged", "default", "no-context"]
_MEMBERS = 3


def _popularity(options: Options) -> Ranker:
    from trainer.baselines.popularity import Popularity

    return Popularity()


def _popularity_of_category(options: Options) -> Ranker:
    from trainer.baselines.popularity_of_category import PopularityOfCategory

    return PopularityOfCategory()


def _own_past(options: Options) -> Ranker:
    from trainer.baselines.own_past import OwnPast

    return OwnPast()


def _itemknn(forward: bool) -> Factory:
    def make(options: Options) -> Ranker:
        from trainer.baselines.itemknn import ItemKnn

        return ItemKnn(forward)

    return make


def _sasrec(loss: Literal["softmax", "gbce"]) -> Factory:
    def make(options: Options) -> Ranker:
        from trainer.baselines.sasrec import SasRec, SasRecSettings

        name = "sasrec" if loss == "softmax" else "gsasrec"
        settings: dict[str, Any] = {} if options.epochs is None else {"epochs": options.epochs}
        if options.chosen_for is not None:
            settings = chosen_settings(options.chosen_for, name) | settings
        return SasRec(
            SasRecSettings(
                loss=loss, cpu_seconds=options.cpu_seconds, arithmetic=options.arithmetic, **settings
            )
        )

    return make


# The generator that was trained last: its heads are models of their own, and one training serves them all.
_TRAINED_GENERATORS: dict[tuple[Options, Kind], Any] = {}


def _generator(variant: str, head: Head, kind: Kind = "tuned") -> Factory:
    def make(options: Options) -> Ranker:
        from trainer.evaluation.generator_ranker import (
            GeneratorRanker,
            TrainedGenerator,
            TrainingRecipe,
            default_recipe,
            tuned_recipe,
        )

        def untrained(
            recipe: TrainingRecipe, first_member: TrainedGenerator | None = None
        ) -> TrainedGenerator:
            recipe = recipe.with_trainer_settings({"arithmetic": options.arithmetic})
            return TrainedGenerator(replace(recipe, cpu_seconds=options.cpu_seconds), first_member)

        epochs = options.epochs
        if kind == "merged":
            # Its first member is the generator that has no others: trained once for both.
            first_member = _TRAINED_GENERATORS.setdefault(
                (options, "tuned"), untrained(tuned_recipe(epochs=epochs))
            )
            generator = untrained(tuned_recipe(epochs=epochs, members=_MEMBERS), first_member)
        elif kind == "tuned" and options.chosen_for is not None:
            generator = untrained(TrainingRecipe(**chosen_settings(options.chosen_for, "sidstream")))
        elif kind == "tuned":
            generator = untrained(tuned_recipe(epochs=epochs))
        else:
            generator = untrained(default_recipe(epochs=epochs, context=kind == "default"))
        trained = _TRAINED_GENERATORS.setdefault((options, kind), generator)
        return GeneratorRanker(f"sidstream-{variant}", trained, head)

    return make


MODELS: dict[str, Factory] = {
    "popularity": _popularity,
    "popularity-of-category": _popularity_of_category,
    "own-past": _own_past,
    "itemknn": _itemknn(forward=False),
    "itemknn-forward": _itemknn(forward=True),
    "sasrec": _sasrec("softmax"),
    "gsasrec": _sasrec("gbce"),
    "sidstream-beam": _generator("beam", "beam"),
    "sidstream-reordered": _generator("reordered", "reordered"),
    "sidstream-dense": _generator("dense", "dense"),
    "sidstream-mixed": _generator("mixed", "mixed"),
    "sidstream-merged-beam": _generator("merged-beam", "beam", "merged"),
    "sidstream-merged-dense": _generator("merged-dense", "dense", "merged"),
    "sidstream-merged-mixed": _generator("merged-mixed", "mixed", "merged"),
    "sidstream-default": _generator("default", "mixed", "default"),
    "sidstream-default-no-context": _generator("default-no-context", "mixed", "no-context"),
}
# What `sidstream evaluate` runs where nothing is named.
DEFAULT = ("popularity", "itemknn", "sasrec", "gsasrec", "sidstream-beam", "sidstream-mixed")


# Written by `python -m benchmarks.tuning`: for each data set and family of models the settings that did best
# on the validation part.
CHOSEN_SETTINGS = Path(__file__).parent / "evaluation" / "chosen_settings.json"


def chosen_settings(dataset: str, family: str) -> dict[str, Any]:
    """What a search chose for "sasrec", "gsasrec" or "sidstream" on a data set.

    Raises SidstreamError where nothing was searched there.
    """
    chosen: dict[str, dict[str, dict[str, Any]]] = {}
    if CHOSEN_SETTINGS.is_file():
        chosen = json.loads(CHOSEN_SETTINGS.read_text())
    if family not in chosen.get(dataset, {}):
        raise SidstreamError(
            f"no settings of {family} were chosen on {dataset}: leave out --chosen-settings, or search them "
            f"in a checkout with `python -m benchmarks.tuning {dataset}`"
        )
    return chosen[dataset][family]


def checked_names(names: Sequence[str]) -> list[str]:
    """The names, each once, in their order. Raises SidstreamError for one that is no model, or for none."""
    unknown = [name for name in names if name not in MODELS]
    if unknown or not names:
        problem = f"there is no model {unknown[0]!r}" if unknown else "no model is named"
        raise SidstreamError(f"{problem}: give one or more of {', '.join(MODELS)}")
    return list(dict.fromkeys(names))
