"""What the agents count, beside what the batch loop counts (streams.wire.batch_stage)."""

from __future__ import annotations

from typing import Final

from prometheus_client import Counter, Gauge

PAIRS: Final = Counter("sidstream_pairs_total", "Preference pairs written", ["scheme"])
SIDS: Final = Counter("sidstream_sids_assigned_total", "Items that were given a SID")
RECODED: Final = Counter(
    "sidstream_histories_recoded_total",
    "Histories brought over to the codebook in use: at a touch, by the scan, or when a SID came",
    ["how"],
)
PARKED: Final = Gauge("sidstream_parked_items", "Items whose events wait for a SID", ["partition"])
WATERMARK: Final = Gauge(
    "sidstream_watermark_seconds", "Event time below which windows are closed", ["stage", "partition"]
)
