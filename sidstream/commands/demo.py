"""`sidstream demo`: the whole loop, end to end, on a real shop's year."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sidstream.console import emit, err, out
from streams.errors import SidstreamError

if TYPE_CHECKING:
    from pathlib import Path

    from sidstream.demo import Runner
    from sidstream.settings import Settings
    from streams.events import CatalogItem, Recommendation
    from streams.wire.client import Client

# A folder with this file was made by an earlier demo, which a new one may clear.
_MARK = "made-by-demo"
# Items of the page that is held before and after the decision: as many as shoppers are shown.
_PAGE = 10

# Steps of SFT, not seconds: the models are as good on a slow processor, which only takes longer. One core
# with AVX-512 needs 50 and 17 seconds for them.
FIRST_STEPS, SECOND_STEPS = 410, 125


def demo(
    since: Annotated[
        str | None, typer.Option(help="replay purchases from this date on (YYYY-MM-DD), not the whole year")
    ] = None,
    train_seconds: Annotated[
        int, typer.Option(help="time at most for training the first model; a third of it for the second")
    ] = 300,
    sessions: Annotated[
        int, typer.Option(help="simulated shopping sessions before the trial; three times as many in it")
    ] = 3000,
    seed: Annotated[
        int | None, typer.Option(help="seed of shoppers and of training; default: settings")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one line of JSON at the end")] = False,
) -> None:
    """Run the loop on a real shop's year: events, histories, a model, shoppers, a second model, the gate.

    Example: sidstream demo
    """
    from sidstream.demo import Runner, set_environment
    from sidstream.settings import load, read

    set_environment(seed)
    home = read().stack.home
    _clear(home)
    runner = Runner(home, err)
    err.print("sidstream: the whole loop on a real shop's year (UCI Online Retail)\n")
    stack = _start(runner, home)
    settings = load()
    sent, first = _learn(runner, settings, since, train_seconds)

    from streams.replay import source_of, user_item_sequences
    from streams.wire.client import Client

    log = source_of("online-retail")
    titles = {item.item_id: item for item in log.catalogue()}
    pasts = user_item_sequences(log)
    with Client(settings.kafka) as client:
        _in_service(runner, client, pasts, first)
        before, second = _second_model(runner, settings, sessions, sent["last_ts"], train_seconds)
        trial = _trial(runner, settings, client, pasts, 3 * sessions, before, second["trial"])
        page = _answered_by_champion(client, pasts, settings.rollout.anchor)
        decision = _decision(runner)
        act = _last_act(runner, client, page, decision, titles, trial["end_ts"])
    result = {
        "stages": [vars(stage) for stage in runner.stages],
        "seconds": round(sum(stage.seconds for stage in runner.stages), 1),
        "seed": settings.shoppers.seed,
        "verdict": decision["verdict"],
        "winner": decision["winner"],
        "sessions": {"before": before, "trial": trial},
        "training": {"first": first, "second": second},
        "gate": decision,
        **act.as_dict(),
    }
    if as_json:
        emit(result, True, "")
    else:
        _print_last_act(act, titles)
        _print_next_steps(act, settings, stack["mlflow"], result["seconds"])


@dataclass(frozen=True)
class _LastAct:
    """One page before and after the decision, and its user's start page before and after one click."""

    user: str
    item: str
    in_trial: list[str]
    now: list[str]
    start_page: Recommendation
    clicked: str
    after_click: Recommendation

    def as_dict(self) -> dict[str, Any]:
        """JSON-able: the page, and the start page's items before and after the click."""
        return {
            "page": {"user": self.user, "item": self.item, "in_trial": self.in_trial, "now": self.now},
            "before": [ranked.item_id for ranked in self.start_page.items],
            "after": [ranked.item_id for ranked in self.after_click.items],
        }


def _print_last_act(act: _LastAct, titles: dict[str, CatalogItem]) -> None:
    out.print(f"\nThree recommendations for user {act.user} on the start page:")
    _show(act.start_page, titles)
    out.print(f"\nand after one more click, on {titles[act.clicked].title!r}:")
    _show(act.after_click, titles)


def _print_next_steps(act: _LastAct, settings: Settings, mlflow: str, seconds: float) -> None:
    gateway = f"http://{settings.gateway.host}:{settings.gateway.port}"
    out.print(
        f"\n{seconds:.0f} s in all. The stack is still up. Ask for more:\n"
        f"  {_binary()} recommend --user {act.user} --item {act.item}\n"
        f"  curl -s {gateway}/v1/recommend -H 'content-type: application/json' "
        f"""-d '{{"user_id": "{act.user}", "item_id": "{act.item}", "k": 3}}'\n"""
        f"Models and metrics: {mlflow}\n"
        f"Stop it with `{_binary()} down` (or `down --purge`, which also removes {settings.stack.home}).",
        markup=False,
    )


def _start(runner: Runner, home: Path) -> dict[str, Any]:
    with runner.stage("stack") as stage:
        stack = runner.command("up")
        home.mkdir(parents=True, exist_ok=True)
        (home / _MARK).touch()
        stage.detail = "Apache Kafka, Redis, MLflow, agents, serving and gateway answer"
    return stack


def _learn(
    runner: Runner, settings: Settings, since: str | None, train_seconds: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What was replayed of the events, and the first model."""
    with runner.stage("catalogue") as stage:
        sent = runner.command("replay", "online-retail", "--only", "catalog")
        fitted = runner.command("codebook", "fit")
        stage.detail = (
            f"{sent['topics']['catalog']:,} items on `catalog`, each with its own SID "
            f"({'x'.join(map(str, fitted['sizes']))} codes)"
        )
    with runner.stage("events") as stage:
        begin = ["--from", since] if since else []
        sent = runner.command("replay", "online-retail", "--only", "events", *begin)
        _drain(runner, settings)
        histories = _count(settings, "h:*")
        stage.detail = f"{sent['sent']:,} purchases through Kafka; {histories:,} histories in Redis"
    with runner.stage("first model") as stage:
        first = _train(runner, FIRST_STEPS, train_seconds)
        stage.detail = _trained(first)
    return sent, first


def _train(runner: Runner, max_steps: int, max_seconds: int) -> dict[str, Any]:
    return runner.command("train", "--max-steps", str(max_steps), "--max-seconds", str(max_seconds))


def _second_model(
    runner: Runner, settings: Settings, sessions: int, last_ts: int, train_seconds: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What shoppers did with the first model, and what was made of it."""
    with runner.stage("shoppers") as stage:
        start = last_ts + 86_400_000
        shopped = runner.command("shoppers", "--sessions", str(sessions), "--start", str(start))
        _drain(runner, settings)
        stage.detail = f"{_shopped(shopped)}; {_pairs(settings):,} preference pairs"
    with runner.stage("second model") as stage:
        second = _train(runner, SECOND_STEPS, max(train_seconds // 3, 5))
        if second["skipped"]:
            raise SidstreamError(f"no second model was made: {second['skipped']}")
        stage.detail = _trained(second)
    return shopped, second


def _trial(
    runner: Runner, settings: Settings, client: Client, pasts: dict[str, list[str]], sessions: int,
    before: dict[str, Any], trial: str,
) -> dict[str, Any]:  # fmt: skip
    """What shoppers did with all arms, and what was planned for them."""
    with runner.stage("trial") as stage:
        from sidstream.demo_trial import planned_trial

        planned = planned_trial(settings, before, sessions, len(pasts))
        user, item = _visitors(pasts)[0]
        runner.until(lambda: _answers_in_trial(client, user, item, trial), 60, "the challengers to answer")
        start = before["end_ts"] + 3_600_000
        shopped = runner.command("shoppers", "--sessions", str(sessions), "--start", str(start))
        _drain(runner, settings)
        stage.detail = f"{_shopped(shopped)}; {planned['sentence']}"
    return shopped | {"plan": planned}


def _in_service(runner: Runner, client: Client, pasts: dict[str, list[str]], first: dict[str, Any]) -> None:
    """Wait until the first model answers."""
    user, item = _visitors(pasts)[0]
    bundles = list(first["bundles"].values())
    with runner.stage("in service") as stage:
        stage.detail = runner.until(
            lambda: _answers_from(client, user, item, bundles), 60, "the first model to answer"
        )


def _decision(runner: Runner) -> dict[str, Any]:
    """The gate's decision record."""
    with runner.stage("gate") as stage:
        # One look, at the end: what the fixed mode is for.
        decision = runner.command("gate", "--mode", "fixed", "--conclude", "--end")
        stage.detail = decision["sentence"].replace(" (mode fixed)", "")
    return decision


def _last_act(
    runner: Runner, client: Client, page: tuple[str, str, list[str]], decision: dict[str, Any],
    titles: dict[str, CatalogItem], end_ts: int,
) -> _LastAct:  # fmt: skip
    """What the decision changed for one page, and what one click changes for its user.

    `page`: its user, its item, and the items that the champion showed there in the trial.
    """
    user, item, in_trial = page
    with runner.stage("next answer") as stage:
        champion = decision["arms"][decision["winner"]]["bundle"]
        answered_by = runner.until(
            lambda: _answers_from(client, user, item, [champion]), 60, "the champion to answer"
        )
        answer = client.ask(_trigger(user, item, _PAGE), timeout=10)
        now = [ranked.item_id for ranked in answer.items]
        # The order of a page is part of its answer: a promotion often only changes who stands first.
        moved = sum(before != after for before, after in zip_longest(in_trial, now))
        stage.detail = f"{answered_by}: {moved} of {len(now)} places show another item than during the trial"
    start_page = client.ask(_trigger(user, None), timeout=10)
    clicked = _elsewhere(titles, start_page)
    after_click = _after_click(client, user, clicked, end_ts + 7_200_000)
    return _LastAct(user, item, in_trial, now, start_page, clicked, after_click)


def _clear(home: Any) -> None:
    """Remove what an earlier demo left; refuse to touch anything else."""
    if not home.exists() or not any(home.iterdir()):
        return
    if not (home / _MARK).exists():
        raise SidstreamError(
            f"{home} holds a stack that no demo made: remove it with `sidstream down --purge`, "
            "or choose another folder with SIDSTREAM_STACK__HOME"
        )
    from sidstream.commands.stack import down

    err.print("clearing what the last demo left ...")
    down(purge=True, as_json=False)


def _binary() -> str:
    """How a person types the command here: the environment is not activated by `make`."""
    import os
    import sys
    from pathlib import Path

    found = Path(sys.executable).parent / "sidstream"
    try:
        return str(found.relative_to(Path.cwd()))
    except ValueError:
        return "sidstream" if os.environ.get("VIRTUAL_ENV") else str(found)


def _trained(result: dict[str, Any]) -> str:
    metrics = result["metrics"]
    hits = metrics.get("sft/hr10")
    said = ""
    if hits is not None:
        said = f"HR@10 {hits:.3f} on held-out events (popularity {metrics['popularity/hr10']:.3f}); "
    if "dpo" in result["bundles"]:
        return f"{said}aligned on {result['pairs']:,} pairs; both on trial beside the champion"
    if result["action"] == "trial":
        return f"{said}on trial; none aligned: {result['no_dpo']}"
    return f"{said}champion"


def _shopped(result: dict[str, Any]) -> str:
    return "; ".join(
        f"{name.split()[0]} CTR {arm['ctr']:.1%} CVR {arm['cvr']:.1%}" for name, arm in result["arms"].items()
    )


def _trigger(user: str, item: str | None, k: int = 3) -> Any:
    import uuid

    from streams.events import Trigger

    return Trigger.new(request_id=uuid.uuid4().hex, user_id=user, item_id=item, k=k, scene="item-page")


def _visitors(pasts: dict[str, list[str]]) -> list[tuple[str, str]]:
    """Users, those of median activity first, each with the item that was bought last."""
    ranked = sorted(pasts, key=lambda user: (len(pasts[user]), user))
    middle = len(ranked) // 2
    nearest = sorted(range(len(ranked)), key=lambda place: abs(place - middle))
    return [(ranked[place], pasts[ranked[place]][-1]) for place in nearest]


def _answered_by_champion(
    client: Client, pasts: dict[str, list[str]], anchor_share: float
) -> tuple[str, str, list[str]]:
    """The first visitor whom the champion answers in the trial, the item of the page, and what it shows.

    For others a promotion need not change the model: a challenger answers them already, or the first model
    goes on to answer them, as the anchor's hold-out. In the first trial that arm is not there yet.
    """
    from registry.releases.rollout import is_held_out

    for user, item in _visitors(pasts):
        if is_held_out(user, anchor_share):
            continue
        answer = client.ask(_trigger(user, item, _PAGE), timeout=10)
        if answer.arm == "champion":
            return user, item, [ranked.item_id for ranked in answer.items]
    raise SidstreamError("the champion answers nobody in the trial: raise SIDSTREAM_ROLLOUT__CHAMPION")


def _answers_from(client: Client, user: str, item: str, bundles: list[str]) -> str | None:
    answer = client.ask(_trigger(user, item), timeout=10)
    return f"user {user} is answered by bundle {answer.bundle}" if answer.bundle in bundles else None


def _answers_in_trial(client: Client, user: str, item: str, trial: str) -> str | None:
    answer = client.ask(_trigger(user, item), timeout=10)
    return f"trial {trial}" if answer.trial == trial else None


def _elsewhere(titles: dict[str, CatalogItem], answer: Recommendation) -> str:
    """The first item of the catalogue whose title shares no word with what is recommended now."""
    said = {word for ranked in answer.items for word in titles[ranked.item_id].title.lower().split()}
    return next(item for item in titles if not said & set(titles[item].title.lower().split()))


def _after_click(client: Client, user: str, clicked: str, ts: int) -> Recommendation:
    """Publish one click and ask again. The agents need a moment: ask until the answer moves, 5 s at most."""
    import time

    from streams.events import Click

    first = client.ask(_trigger(user, None), timeout=10)
    client.publish(Click.new(user_id=user, item_id=clicked, ts=ts))
    deadline = time.monotonic() + 5
    while True:
        answer = client.ask(_trigger(user, None), timeout=10)
        moved = [ranked.item_id for ranked in answer.items] != [ranked.item_id for ranked in first.items]
        if moved or time.monotonic() > deadline:
            return answer


def _show(answer: Recommendation, titles: dict[str, CatalogItem]) -> None:
    for place, ranked in enumerate(answer.items, 1):
        item = titles[ranked.item_id]
        out.print(f"  {place}. {item.title:<40} {item.price or 0:7.2f}  ({ranked.item_id})", markup=False)


def _drain(runner: Runner, settings: Settings) -> None:
    """Wait until the agents have applied every event."""
    from streams.wire.admin import consumer_group_lag

    runner.until(
        lambda: "done" if consumer_group_lag(settings.kafka, settings.agents.group) == 0 else None,
        300, "the agents to apply every event",
    )  # fmt: skip


def _count(settings: Settings, pattern: str) -> int:
    from streams.state.redisdb import redis_client

    with redis_client(settings.redis) as server:
        return sum(1 for _ in server.scan_iter(match=pattern, count=1000))


def _pairs(settings: Settings) -> int:
    from streams.wire.admin import end_offsets

    return sum(end_offsets(settings.kafka, "preferences").values())
