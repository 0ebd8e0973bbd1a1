"""`sidstream demo`: the whole loop, end to end, on a real shop's year."""

from __future__ import annotations

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

# What the trial is planned for: about the rise of CVR that alignment gives with these shoppers
# (docs/decisions/0010), and the variance of CVR by users over that of independent clicks in such a trial.
LIFT, DESIGN_EFFECT = 0.15, 1.6
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
    import os

    from sidstream.demo import SETTINGS, Runner
    from sidstream.settings import load, read

    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    if seed is not None:
        os.environ |= {"SIDSTREAM_SHOPPERS__SEED": str(seed), "SIDSTREAM_TRAINER__SEED": str(seed)}
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
        user, item = _visitors(pasts)[0]
        with runner.stage("in service") as stage:
            stage.detail = runner.until(
                lambda: _answers_from(client, user, item, list(first["bundles"].values())),
                60,
                "the first model to answer",
            )
        before, second = _second_model(runner, settings, sessions, sent["last_ts"], train_seconds)
        trial = _trial(runner, settings, client, pasts, 3 * sessions, before, second["trial"])
        user, item, shown = _answered_by_champion(client, pasts, settings.rollout.anchor)
        with runner.stage("gate") as stage:
            # One look, at the end: what the fixed mode is for.
            decision = runner.command("gate", "--mode", "fixed", "--conclude", "--end")
            stage.detail = decision["sentence"].replace(" (mode fixed)", "")
        start_page, clicked, after, now = _last_act(
            runner, client, user, item, shown, decision, titles, trial["end_ts"]
        )
    result = {
        "stages": [vars(stage) for stage in runner.stages],
        "seconds": round(sum(stage.seconds for stage in runner.stages), 1),
        "seed": settings.shoppers.seed,
        "verdict": decision["verdict"],
        "winner": decision["winner"],
        "sessions": {"before": before, "trial": trial},
        "training": {"first": first, "second": second},
        "gate": decision,
        "page": {"user": user, "item": item, "in_trial": shown, "now": now},
        "before": [ranked.item_id for ranked in start_page.items],
        "after": [ranked.item_id for ranked in after.items],
    }
    if as_json:
        emit(result, True, "")
        return
    out.print(f"\nThree recommendations for user {user} on the start page:")
    _show(start_page, titles)
    out.print(f"\nand after one more click, on {titles[clicked].title!r}:")
    _show(after, titles)
    gateway = f"http://{settings.gateway.host}:{settings.gateway.port}"
    out.print(
        f"\n{result['seconds']:.0f} s in all. The stack is still up. Ask for more:\n"
        f"  {_binary()} recommend --user {user} --item {item}\n"
        f"  curl -s {gateway}/v1/recommend -H 'content-type: application/json' "
        f"""-d '{{"user_id": "{user}", "item_id": "{item}", "k": 3}}'\n"""
        f"Models and metrics: {stack['mlflow']}\n"
        f"Stop it with `{_binary()} down` (or `down --purge`, which also removes {home}).",
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
        planned = planned_trial(settings, before, sessions, len(pasts))
        user, item = _visitors(pasts)[0]
        runner.until(lambda: _answers_in_trial(client, user, item, trial), 60, "the challengers to answer")
        start = before["end_ts"] + 3_600_000
        shopped = runner.command("shoppers", "--sessions", str(sessions), "--start", str(start))
        _drain(runner, settings)
        stage.detail = f"{_shopped(shopped)}; {planned['sentence']}"
    return shopped | {"plan": planned}


def planned_trial(
    settings: Settings, before: dict[str, Any], sessions: int, everybody: int
) -> dict[str, Any]:
    """What `sidstream gate plan` says of a trial of so many sessions, by the rates of the champion so far.

    `before`: what `sidstream shoppers` said of the champion's sessions; `everybody`: users who may come. The
    smallest arm is planned for: users_needed in it for the power of .8, and the power of those who come.
    """
    import math

    from registry.experiment import sample_size

    rollout, s = settings.rollout, settings.shoppers
    weights = (rollout.champion, rollout.sft, rollout.dpo)
    came = everybody * (1 - math.exp(-sessions / everybody))
    users = round(came * (1 - rollout.anchor) * min(weights) / sum(weights))
    clicks, shown, purchases = (
        sum(arm[name] for arm in before["arms"].values()) for name in ("clicks", "shown", "purchases")
    )
    planned: dict[str, Any] = {"lift": LIFT, "users": users, "users_needed": None, "power": None}
    if not 0 < purchases * (1 + LIFT) < clicks < shown:
        return planned | {"sentence": "too little was bought to plan it"}
    expected = sample_size.ExpectedRates(
        purchases / clicks, LIFT, clicks / shown, s.k * sessions / came, design_effect=DESIGN_EFFECT
    )
    needed = sample_size.users_needed(expected, settings.gate, "fixed")
    power = sample_size.power(users, expected, settings.gate, "fixed")
    return planned | {
        "users_needed": needed,
        "power": round(power, 3),
        "sentence": f"{users:,} users in the smallest arm, {needed:,} planned for CVR +{LIFT:.0%}",
    }


def _last_act(
    runner: Runner, client: Client, user: str, item: str, shown: list[str], decision: dict[str, Any],
    titles: dict[str, CatalogItem], end_ts: int,
) -> tuple[Recommendation, str, Recommendation, list[str]]:  # fmt: skip
    """What the decision changed for one page, and what one click changes for its user.

    The start page's items, the item clicked, the start page's items after that, and the items of the page.
    """
    with runner.stage("next answer") as stage:
        champion = decision["arms"][decision["winner"]]["bundle"]
        said = runner.until(
            lambda: _answers_from(client, user, item, [champion]), 60, "the champion to answer"
        )
        answer = client.ask(_trigger(user, item, _PAGE), timeout=10)
        now = [ranked.item_id for ranked in answer.items]
        others = len(set(now) - set(shown))
        stage.detail = f"{said}: {others} of {len(now)} items are others than during the trial"
    before = client.ask(_trigger(user, None), timeout=10)
    clicked = _elsewhere(titles, before)
    return before, clicked, _after_click(client, user, clicked, end_ts + 7_200_000), now


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
