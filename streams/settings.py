"""Settings of the wire: where Kafka and Redis are, how topics are made, what an event may weigh."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator


class Section(BaseModel):
    """One table of the settings file. A name that it does not know is an error, not silence."""

    model_config = ConfigDict(extra="forbid")


class KafkaSettings(Section):
    """Where Kafka is and how to speak to it."""

    bootstrap: str | None = Field(None, description="host:port,host:port; empty: the local stack's broker")
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        "PLAINTEXT", description="how the connection is protected"
    )
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] | None = Field(
        None, description="how this client proves who it is; empty: it does not"
    )
    sasl_username: str | None = Field(None, description="this client's name")
    sasl_password: SecretStr | None = Field(
        None, description="this client's password: best in the environment"
    )
    ssl_cafile: str | None = Field(None, description="PEM file of the authority that signed the brokers")
    partitions: int = Field(4, ge=1, le=512, description="partitions of every topic keyed by user or item")
    replication: int = Field(1, ge=1, le=5, description="replicas of every topic")
    retention_days: int = Field(400, ge=1, description="how long events are kept (not the compacted topics)")
    max_event_bytes: int = Field(262_144, ge=1024, description="the largest event that a topic takes")


class RedisSettings(Section):
    """Where Redis is."""

    url: SecretStr | None = Field(None, description="redis://host:port/0; empty: the local stack's server")

    @field_validator("url")
    @classmethod
    def _is_redis(cls, url: SecretStr | None) -> SecretStr | None:
        if url and not url.get_secret_value().startswith(("redis://", "rediss://", "unix://")):
            raise ValueError("a Redis address starts with redis://, rediss:// (TLS) or unix://")
        return url


class HistorySettings(Section):
    """How much of a user's past is kept."""

    max_length: int = Field(50, ge=1, le=1000, description="interactions kept for a user")
    max_age_days: int = Field(400, ge=1, description="older than this before the newest one: dropped")


class ShoppersSettings(Section):
    """How the simulated shoppers behave. Times are event time: a simulated clock, not the wall's."""

    seed: int = Field(7, description="seed of tastes, of item values and of every decision")
    k: int = Field(10, ge=1, le=100, description="items that a shopper is shown")
    batch: int = Field(200, ge=1, le=5000, description="sessions in flight at once")
    session_spacing_s: float = Field(10.0, gt=0, description="event time between two sessions, seconds")
    timeout_s: float = Field(30.0, gt=0, description="how long a shopper waits for an answer, seconds")
    click_base: float = Field(-2.3, description="log-odds of a click on an item that means nothing to a user")
    click_taste: float = Field(3.0, description="weight of the user's taste in the click's log-odds")
    click_trigger: float = Field(2.0, description="weight of the trigger item in the click's log-odds")
    click_position: float = Field(
        0.97, gt=0, le=1, description="chance that a shopper who looked at a place looks at the next one"
    )
    buy_base: float = Field(-1.8, description="log-odds of buying a clicked item of mean value")
    value: Literal["title", "taste"] = Field(
        "title",
        description="what an item is worth to a buyer; title: the same to all, a function of its title; "
        "taste: to each shopper something else, which no title says",
    )
    buy_value: float = Field(1.8, description="weight of the item's value in the purchase's log-odds")
    buy_taste: float = Field(0.5, description="weight of the user's taste in the purchase's log-odds")
