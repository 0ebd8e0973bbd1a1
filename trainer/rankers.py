"""The models that can be evaluated, by name. Each is imported only when it is asked for: some need torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from streams.errors import SidstreamError
from trainer.evaluation.ranker import Head, Ranker
from trainer.settings import Arithmetic


class Options(NamedTuple):
    """What a run asks of a model that is trained."""

    max_seconds: float | None = None  # time budget of one `fit`; None: until it stops by itself
    epochs: int | None = None  # passes over the training part, at most; None: the model's own
    arithmetic: Arithmetic = "auto"  # of matrix products in training


Factory = Callable[[Options], Ranker]
# By which settings the generator is trained: those found for Amazon Beauty, the same of several that are
# merged, the defaults, or the defaults without what is known of users.
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


def _sasrec(samples: str) -> Factory:
    def make(options: Options) -> Ranker:
        from trainer.baselines.sasrec import SasRec, SasRecSettings

        own = SasRecSettings(samples=samples, max_seconds=options.max_seconds, arithmetic=options.arithmetic)
        return SasRec(own if options.epochs is None else replace(own, epochs=options.epochs))

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

        limits = (options.max_seconds, options.epochs)

        def untrained(
            recipe: TrainingRecipe, first_member: TrainedGenerator | None = None
        ) -> TrainedGenerator:
            return TrainedGenerator(
                recipe.with_trainer_settings({"arithmetic": options.arithmetic}), first_member
            )

        if kind == "merged":
            # Its first member is the generator that has no others: trained once for both.
            first_member = _TRAINED_GENERATORS.setdefault(
                (options, "tuned"), untrained(tuned_recipe(*limits))
            )
            generator = untrained(tuned_recipe(*limits, members=_MEMBERS), first_member)
        elif kind == "tuned":
            generator = untrained(tuned_recipe(*limits))
        else:
            generator = untrained(default_recipe(*limits, kind == "default"))
        trained = _TRAINED_GENERATORS.setdefault((options, kind), generator)
        return GeneratorRanker(f"sidstream-{variant}", trained, head)

    return make


MODELS: dict[str, Factory] = {
    "popularity": _popularity,
    "popularity-of-category": _popularity_of_category,
    "own-past": _own_past,
    "itemknn": _itemknn(forward=False),
    "itemknn-forward": _itemknn(forward=True),
    "sasrec": _sasrec("position"),
    "sasrec-prefix": _sasrec("prefix"),
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
DEFAULT = ("popularity", "itemknn", "sasrec", "sidstream-beam", "sidstream-mixed")


def checked_names(names: Sequence[str]) -> list[str]:
    """The names, each once, in their order. Raises SidstreamError for one that is no model, or for none."""
    unknown = [name for name in names if name not in MODELS]
    if unknown or not names:
        problem = f"there is no model {unknown[0]!r}" if unknown else "no model is named"
        raise SidstreamError(f"{problem}: give one or more of {', '.join(MODELS)}")
    return list(dict.fromkeys(names))
