"""Runs one serving agent as a process: uvloop, signals, quiet libraries."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable

import uvloop

from serving.agent import ServingAgent

# Libraries that log each rebalance and reconnection; only their warnings are shown.
_QUIETED_LOGGERS = ("aiokafka", "faust", "kafka", "mode", "asyncio")


def run_worker(create_agent: Callable[[], ServingAgent]) -> None:
    """Answer triggers until SIGTERM or SIGINT; requests under way are finished. Raises other errors."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for name in _QUIETED_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)

    async def main() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        await create_agent().run(stop)

    uvloop.run(main())
