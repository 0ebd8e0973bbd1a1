"""`sidstream agents`: the worker that turns events into histories, SIDs, preference pairs and outcomes."""

from __future__ import annotations


def agents() -> None:
    """Run one agents worker until SIGTERM; start more of them to share the partitions.

    Example: sidstream agents
    """
    from agents.app import check_prerequisites, create_app, run_worker
    from registry.bundles.store import Registry
    from sidstream.settings import load

    settings = load()
    check_prerequisites(settings.kafka, settings.redis)
    run_worker(
        lambda: create_app(
            settings.kafka, settings.redis, settings.history, settings.agents, Registry(settings.registry)
        )
    )
