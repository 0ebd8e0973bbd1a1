"""Settings of the registry: where bundles are kept, how codebooks are made, how a trial is run and judged."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import platformdirs
from pydantic import Field, field_validator

from streams.settings import Section


class RegistrySettings(Section):
    """Where the model registry is."""

    tracking_uri: str | None = Field(None, description="http://host:port of MLflow; empty: the local stack's")
    name: str = Field("sidstream", pattern=r"^[A-Za-z0-9._-]{1,64}$", description="the recommender's name")
    cache: Path | None = Field(None, description="where bundles are kept; empty: the user's cache folder")
    timeout_s: int = Field(30, ge=1, description="how long one call to MLflow may take")

    @property
    def cache_folder(self) -> Path:
        """The folder that downloaded bundles are kept in."""
        return self.cache or platformdirs.user_cache_path("sidstream") / "bundles"


class CodebookSettings(Section):
    """How the codebook is fitted."""

    embedder: str = Field(
        "wordllama",
        description="what turns an item's text into a vector: wordllama, or sentence-transformers:<folder or "
        "model id>",
    )
    collaborative: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of an item's vector that comes from what users touched together; 0: text alone",
    )
    collaborative_dim: int = Field(128, ge=2, le=1024, description="length of that part of the vector")
    method: Literal["kmeans", "rqvae"] = Field(
        "kmeans", description="residual k-means, or an encoder trained with its codes (RQ-VAE)"
    )
    levels: int = Field(3, ge=2, le=8, description="codes of an SID")
    # On 3,659 shop titles, after equal training, 256 codes were easier to predict than 128, those than 64: a
    # prefix then holds six items at most, so that little is left to the last code.
    size: int = Field(256, ge=2, le=65_536, description="codes of each level but the last")
    # Room for newcomers even where the catalogue at hand is tiny.
    last: int = Field(16, ge=1, le=65_536, description="codes of the last level at least")
    headroom: float = Field(1.5, ge=1.0, description="slots of a prefix over the items of the largest one")
    seed: int = Field(7, ge=0, description="seed of k-means: the same catalogue gives the same codebook")


class GateSettings(Section):
    """How a trial is judged."""

    mode: Literal["sequential", "fixed", "point"] = Field(
        "sequential",
        description="sequential: evidence that holds however often one looks; fixed: evidence at one look, "
        "at the end; point: the published rule, on point estimates",
    )
    alpha: float = Field(
        0.05, gt=0, lt=0.5, description="false promotions: error rate of each one-sided test"
    )
    margin: float = Field(0.10, ge=0, lt=1, description="relative fall of CTR that is still accepted")
    # The boundary is flat around its best place: half or twice the true effect costs a few percent of users.
    effect: float = Field(
        0.10, gt=0, le=10, description="relative change that sequential mode is quickest to find"
    )
    anchor_margin: float = Field(
        0.10, ge=0, lt=1, description="relative fall of CTR below the anchor's that is still accepted in all"
    )
    value: Literal["none", "revenue", "commission"] = Field(
        "none",
        description="a sum of the orders that must not be lower per user, beside all else: revenue (price by "
        "quantity) or commission, as purchases carry them",
    )
    # Fifty pages of ten items within one trial: a person seldom sees more, a crawler soon does.
    max_impressions_per_user: int = Field(
        500,
        ge=1,
        description="impressions of one user that count, the first of a trial: one bot must not decide it",
    )
    srm_alpha: float = Field(
        0.001,
        gt=0,
        lt=0.5,
        description="error rate of the check that users came to arms as their weights say",
    )
    # Below about a hundred clusters the normal approximation of the variance is too kind.
    min_users: int = Field(100, ge=2, description="users that each arm must have served")
    min_impressions: int = Field(1000, ge=1, description="impressions that each arm must have")


class RolloutSettings(Section):
    """Shares of users in a trial; scaled to 1 over the arms that take part, without the anchor's."""

    champion: float = Field(0.4, gt=0, le=1, description="share of the champion")
    sft: float = Field(0.3, gt=0, le=1, description="share of challenger-sft")
    dpo: float = Field(0.3, gt=0, le=1, description="share of challenger-dpo")
    # The least that is usual (1 to 5 %): these users never see a better model than the anchor.
    anchor: float = Field(
        0.02, ge=0, lt=0.5, description="share of users that are held out on the anchor, for good; 0: none"
    )
    steps: list[float] = Field(
        [0.0, 0.1, 1.0],
        min_length=1,
        description="what share of their full weight challengers get, step by step, in `sidstream cycle`; 0: "
        "a shadow that nobody sees; the last must be 1",
    )
    step_requests: int = Field(
        300, ge=1, description="requests that each challenger answers in a step before the next one"
    )
    watch_requests: int = Field(
        1000, ge=0, description="requests that a promoted model answers under guard before the next training"
    )
    max_hours: float = Field(
        336.0, gt=0, description="length of a trial, in event time, after which it ends without a verdict"
    )

    @field_validator("steps")
    @classmethod
    def _rising(cls, steps: list[float]) -> list[float]:
        if steps != sorted(set(steps)) or steps[0] < 0 or steps[-1] != 1:
            raise ValueError("must rise from 0 or more to 1, as [0, 0.1, 1]")
        return steps


class GuardSettings(Section):
    """What ends a trial, or takes a promoted model back, at once."""

    alpha: float = Field(
        0.001, gt=0, lt=0.5, description="error rate of each guard, however often it is looked at"
    )
    failed: float = Field(0.01, ge=0, le=1, description="share of requests on which the model may fail")
    slow: float = Field(0.05, ge=0, le=1, description="share of the calls of a model that may be slow")
    slow_ms: float = Field(200.0, gt=0, le=5000, description="model time (ms) above which a call is slow")
    invalid: float = Field(
        0.25,
        ge=0,
        le=1,
        description="how much more of its probability than the control a model may spend on no item",
    )
