"""Settings of the registry: where bundles are kept, how codebooks are made, how a trial is run and judged."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import platformdirs
from pydantic import Field

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

    levels: int = Field(3, ge=2, le=8, description="codes of an SID")
    # On 3,659 shop titles, after equal training, 256 codes were easier to predict than 128, those than 64: a
    # prefix then holds six items at most, so that little is left to the last code.
    size: int = Field(256, ge=2, le=65_536, description="codes of each level but the last")
    headroom: float = Field(1.5, ge=1.0, description="slots of a prefix over the items of the largest one")
    seed: int = Field(7, ge=0, description="seed of k-means: the same catalogue gives the same codebook")


class GateSettings(Section):
    """How a trial is judged."""

    mode: Literal["sequential", "fixed", "point"] = Field(
        "sequential",
        description="sequential: evidence that holds however often one looks; fixed: evidence at one look, "
        "at the end; point: the published rule, on point estimates",
    )
    alpha: float = Field(0.05, gt=0, lt=0.5, description="error rate of each one-sided test")
    margin: float = Field(0.10, ge=0, lt=1, description="relative fall of CTR that is still accepted")
    # The boundary is flat around its best place: half or twice the true effect costs a few percent of users.
    effect: float = Field(
        0.10, gt=0, le=10, description="relative change that sequential mode is quickest to find"
    )
    anchor_margin: float = Field(
        0.10, ge=0, lt=1, description="relative fall of CTR below the anchor's that is still accepted in all"
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
    """Shares of users in a trial; scaled to 1 over the arms that take part."""

    champion: float = Field(0.4, gt=0, le=1, description="share of the champion")
    sft: float = Field(0.3, gt=0, le=1, description="share of challenger-sft")
    dpo: float = Field(0.3, gt=0, le=1, description="share of challenger-dpo")
