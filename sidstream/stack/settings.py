"""Settings of the local stack: where its state is, how many brokers, how long a start may take."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, field_validator

from sidstream.stack.kafka_jars import MAVEN_CENTRAL
from streams.settings import Section


class StackSettings(Section):
    """One stack on this machine; `home` is all that it leaves there, besides the cache of Kafka's jars."""

    home: Path = Field(Path(".sidstream"), description="the folder of the stack's state, data and logs")
    brokers: int = Field(1, description="Kafka brokers: 1, or 3, which survive the loss of one")
    heap_mb: int = Field(512, ge=128, le=65_536, description="the largest heap of a Kafka broker, MiB")
    start_timeout_s: float = Field(300.0, gt=0, le=3600, description="how long one service may take to start")
    stop_timeout_s: float = Field(
        20.0, gt=0, le=600, description="between asking a service to end and a kill"
    )
    maven_repository: str = Field(
        MAVEN_CENTRAL, pattern=r"^https?://\S+$", description="where Kafka's jars are fetched, once"
    )
    jars: Path | None = Field(None, description="where the jars are kept; empty: the user's cache folder")
    restart_backoff_s: float = Field(1.0, gt=0, description="wait before a restart; doubled each time")
    # Long enough that a broken service costs little, short enough that a mended one is soon back.
    restart_backoff_max_s: float = Field(30.0, gt=0, description="the longest wait before a restart")

    @field_validator("brokers")
    @classmethod
    def _one_or_three(cls, brokers: int) -> int:
        # Two can lose none: a majority of two is two.
        if brokers not in (1, 3):
            raise ValueError("give 1 or 3")
        return brokers
