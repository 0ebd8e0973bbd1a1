"""Runs one serving agent as a process: uvloop, signals, quiet libraries."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable

import uvloop

from serving.agent import ServingAgent

# Libraries that tell of each rebalance and reconnection; their warnings still come through.
_QUIET = ("aiokafka", "faust", "kafka", "mode", "asyncio")


def run_worker(make: Callable[[], ServingAgent]) -> None:
    """Answer triggers until SIGTERM or SIGINT; requests under way are finished. Raises what ended it else."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)

    async def main() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        await make().run(stop)

    uvloop.run(main())
