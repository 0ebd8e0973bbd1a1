"""Settings of serving: the beam, the batch, threads, and where the agent and the gateway listen."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, SecretStr

from registry.bundles.ranking import RepeatRule
from registry.decoding.list_rules import ListLimits
from streams.settings import Section


class ServingSettings(Section):
    """How the serving agent answers."""

    group: str = Field("sidstream-serving", min_length=1, description="consumer group of the serving agents")
    rollout: str | None = Field(
        None, description="name of the recommender served; empty: the registry's name"
    )
    beam: int = Field(
        ListLimits.beam, ge=1, le=1000, description="beams kept a level; a request for more items widens it"
    )
    max_batch: int = Field(16, ge=1, le=512, description="requests answered in one call of the model")
    threads: int = Field(1, ge=1, le=64, description="threads of one operator in ONNX Runtime")
    repeat: Literal["bundle", "always", "never", "bought", "within"] = Field(
        "bundle",
        description="which items of a user's own history may be answered: as the bundle was fitted, always, "
        "never, none that was bought, none that was touched within repeat_within_s",
    )
    repeat_within_s: int = Field(86_400, ge=1, description="seconds, for repeat = within")
    exact_items: int = Field(
        ListLimits.exact_items,
        ge=0,
        description="in larger catalogues the dense head scores the beam's items alone",
    )
    explore: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of requests whose first item is drawn by chance, for off-policy estimates; "
        "0.02 is usual",
    )
    explore_candidates: int = Field(
        50, ge=2, le=1000, description="the first item is drawn from this many of the best"
    )
    explore_temperature: float = Field(
        1.0, ge=0.01, le=100, description="it is drawn by softmax(score / temperature); high: nearly evenly"
    )
    shadow: float = Field(
        0.1,
        ge=0,
        le=1,
        description="share of requests that arms without users answer unseen, while none waits",
    )
    index_delay_s: float = Field(
        0.2,
        ge=0,
        le=60,
        description="changes of the catalogue are gathered this long before the index is rebuilt",
    )
    redis_timeout_s: float = Field(0.25, gt=0, le=30, description="wait for one read of histories")
    redis_wait_s: float = Field(
        2.0, ge=0, le=60, description="retry reading histories this long, then answer without them"
    )
    session_timeout_s: float = Field(
        10.0, ge=6, le=300, description="a worker that is silent this long is dead: others take its triggers"
    )
    retry_max_s: float = Field(30.0, gt=0, le=600, description="longest pause between two tries of one thing")
    metrics_host: str = Field(
        "127.0.0.1", description="address that the agent's /metrics and /health listen on"
    )
    metrics_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="port of /metrics and /health of the agent; 0: any free; empty: none",
    )

    @property
    def limits(self) -> ListLimits:
        """How far a list is searched, and what it may repeat."""
        if self.repeat == "bundle":
            return ListLimits(self.beam, self.exact_items)
        within_s = self.repeat_within_s if self.repeat == "within" else 0
        return ListLimits(self.beam, self.exact_items, RepeatRule(repeats=self.repeat, within_s=within_s))


class GatewaySettings(Section):
    """Where the HTTP gateway listens and how long it waits for an answer."""

    host: str = Field("127.0.0.1", description="address that the gateway listens on")
    port: int = Field(8080, ge=0, le=65535, description="port that the gateway listens on")
    timeout_s: float = Field(5.0, gt=0, le=120, description="wait for the answer to one request")
    token: SecretStr | None = Field(None, description="bearer token that /v1 asks for; empty: none")
