"""`sidstream up`, `down`, `status` and `doctor`: the local stack."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from sidstream.console import emit, err

if TYPE_CHECKING:
    from sidstream.stack.state import ServiceState, StackState

Json = Annotated[bool, typer.Option("--json", help="print one line of JSON")]


def up(
    infra: Annotated[
        bool, typer.Option("--infra", help="only Kafka, Redis and MLflow, without the services")
    ] = False,
    trainer: Annotated[bool, typer.Option("--trainer", help="train periodically, too")] = False,
    brokers: Annotated[int | None, typer.Option(help="Kafka brokers: 1 or 3")] = None,
    as_json: Json = False,
) -> None:
    """Start Kafka, Redis, MLflow, the agents, serving and the gateway; a second `up` finds the first.

    A server whose address the settings give is used, not started. It returns when everything answers.

    Example: sidstream up
    """
    from sidstream.settings import read
    from sidstream.stack.control import report
    from sidstream.stack.control import up as start
    from streams.errors import SidstreamError

    settings = read()
    if brokers is not None:
        if brokers not in (1, 3):
            raise SidstreamError(f"--brokers is {brokers}: give 1 or 3")
        stack = settings.stack.model_copy(update={"brokers": brokers})
        settings = settings.model_copy(update={"stack": stack})
    state, was_running = start(settings, infra, trainer, _ServiceLines())
    result = report(state, settings.stack.home) | {"found": was_running}
    head = "the stack was up already" if was_running else "the stack is up"
    emit(result, as_json, f"{head}\n{_addresses(state)}")


def down(
    purge: Annotated[bool, typer.Option("--purge", help="remove the stack's folder with all data")] = False,
    as_json: Json = False,
) -> None:
    """Stop the local stack; its data stay, unless --purge is given.

    Example: sidstream down --purge
    """
    from sidstream.settings import read
    from sidstream.stack.control import down as stop

    stack = read().stack
    home = stack.home.resolve()
    ran = stop(stack, purge)
    text = "the stack is down" if ran else "no stack ran"
    emit(
        {"stopped": ran, "purged": purge, "home": str(home)},
        as_json,
        f"{text}; removed {home}" * purge or text,
    )


def status(as_json: Json = False) -> None:
    """Show what of the local stack runs, and where; exit code 1 unless all of it does.

    Example: sidstream status
    """
    from sidstream.settings import read
    from sidstream.stack.control import report
    from sidstream.stack.state import is_running, read_state

    home = read().stack.home
    state = read_state(home)
    result = report(state, home)
    lines = [f"the stack in {result['home']} is {result['phase']}"]
    if state is not None and state.error and not is_running(state):
        lines.append(f"the last start failed: {state.error}")
    if state is not None and is_running(state):
        lines += [_line(service) for service in state.services]
        lines.append(_addresses(state))
    emit(result, as_json, "\n".join(lines))
    running = all(service["state"] in ("up", "given") for service in result["services"])
    if result["phase"] != "up" or not running:
        raise typer.Exit(1)


def doctor(as_json: Json = False) -> None:
    """Check everything that the stack needs, one line each with its remedy; exit code 1 if anything fails.

    Example: sidstream doctor
    """
    from sidstream.settings import read
    from sidstream.stack.doctor import run_checks

    checks = run_checks(read())
    ok = all(check.ok for check in checks)
    result = {"ok": ok, "checks": [check.as_dict() for check in checks]}
    emit(result, as_json, "\n".join(check.line for check in checks))
    if not ok:
        raise typer.Exit(1)


class _ServiceLines:
    """Prints a line for each service when its state changes while the stack starts (stderr)."""

    def __init__(self) -> None:
        self._printed: dict[str, str] = {}

    def __call__(self, state: StackState) -> None:
        for service in state.services:
            line = _line(service) if service.state in ("up", "given", "failed", "restarting") else None
            line_or_note = line or (f"{service.name}: {service.note}" if service.note else None)
            if line_or_note and self._printed.get(service.name) != line_or_note:
                self._printed[service.name] = line_or_note
                err.print(line_or_note, markup=False)


def _line(service: ServiceState) -> str:
    mark = "ok" if service.state in ("up", "given") else service.state
    seconds = f"{service.seconds:6.1f} s" if service.seconds is not None else " " * 8
    tail = service.address or (f"pid {service.pid}" if service.pid else "")
    if service.state == "given":
        tail = f"{tail} (given, not started)"
    if service.restarts:
        tail += f" (restarts: {service.restarts})"
    if service.note and service.state != "up":
        tail += f" ({service.note})"
    return f"{mark:<11}{service.name:<9}{seconds}  {tail}".rstrip()


def _addresses(state: StackState) -> str:
    named_addresses = [
        ("Kafka", state.kafka),
        ("Redis", state.redis),
        ("MLflow", state.mlflow),
        ("gateway", state.gateway),
    ]
    return "\n".join(f"  {name:<8} {address}" for name, address in named_addresses if address)
