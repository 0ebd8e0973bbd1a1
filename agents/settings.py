"""Settings of the agents: how they read, how long they wait, what they remember."""

from __future__ import annotations

from pydantic import Field

from streams.settings import Section


class AgentsSettings(Section):
    """The workers that turn events into histories, SIDs, preference pairs and outcomes."""

    group: str = Field(
        "sidstream-agents", min_length=1, description="consumer group; workers in it share the work"
    )
    batch_size: int = Field(2000, ge=1, le=50_000, description="records handled together, at most")
    batch_deadline_s: float = Field(60.0, gt=0, description="a batch that takes longer has failed")
    attempts: int = Field(3, ge=1, le=20, description="tries of a failing record before it is dead-lettered")
    session_timeout_s: float = Field(
        10.0, ge=6, le=300, description="silence after which a worker's partitions go to the others"
    )
    attribution_window_s: int = Field(
        1800, ge=1, description="a purchase this long after a click or impression is attributed to it"
    )
    allowed_lateness_s: int = Field(
        60, ge=0, description="how far out of order events may arrive, in event time"
    )
    cohort_s: int = Field(
        3600, ge=1, description="length of a cohort: requests first seen within it are summed together"
    )
    idle_s: float = Field(
        5.0, gt=0, description="a topic that is silent this long no longer holds back event time"
    )
    max_rejected: int = Field(8, ge=1, le=100, description="rejected items of a preference pair, at most")
    park_seconds: int = Field(30, ge=0, description="how long an event waits for its item's SID")
    codebook_check_s: float = Field(
        5.0, gt=0, description="how often the registry is asked for a new codebook"
    )
    metrics_host: str = Field("127.0.0.1", description="address of /metrics")
    metrics_port: int | None = Field(
        None, ge=1, le=65_535, description="Prometheus metrics; empty: not served"
    )

    @property
    def window_ms(self) -> int:
        """The attribution window in milliseconds."""
        return 1000 * self.attribution_window_s

    @property
    def horizon_ms(self) -> int:
        """After an answer, how long its clicks may come: the window, and the lateness that is allowed."""
        return self.window_ms + 1000 * self.allowed_lateness_s
