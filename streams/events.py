"""The events on the wire: one JSON object a Kafka record, checked on the way in.

Every event carries `schema_version` (1), a unique `event_id` and `ts`, the time at which it happened in
milliseconds since 1970-01-01 UTC. Unknown fields are ignored, so a producer may add its own.
"""

from __future__ import annotations

import re
import time
import uuid
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, get_args

import msgspec
from msgspec import Meta

SCHEMA_VERSION = 1
# 2000-01-01: an earlier time is a unit mistake (seconds for milliseconds), not an old event.
EARLIEST_TS = 946_684_800_000
# How far a producer's clock may run ahead of ours before its event is refused.
MAX_AHEAD_MS = 24 * 3600 * 1000

# Kafka's and Redis's integers, and Parquet's, have 64 bits; nobody buys more of one thing than this.
MAX_QUANTITY = 1_000_000_000
# The end of the text, in Python's and in JavaScript's regular expressions ("$" lets a newline follow).
_END = r"(?![\s\S])"

Id = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=128,
        pattern=rf"^[^\x00-\x1f\x7f]+{_END}",
        description="1 to 128 characters, none of them a control character",
    ),
]
Ts = Annotated[
    int,
    Meta(ge=EARLIEST_TS, description="when it happened, milliseconds since 1970-01-01 UTC"),
]
Price = Annotated[float, Meta(ge=0, description="price of one unit, in the shop's currency")]
Rate = Annotated[float, Meta(ge=0, le=1)]
Sid = Annotated[list[Annotated[int, Meta(ge=0, le=65535)]], Meta(min_length=1, max_length=8)]
Items = Annotated[list[Id], Meta(max_length=1000)]
Reward = Literal["click", "purchase", "price", "commission"]
Preferences = Annotated[
    dict[Reward, Annotated[float, Meta(ge=0, le=1e6)]],
    Meta(
        min_length=1,
        description="what the items should bring, with weights from 0 to 1,000,000, one of them above 0",
        extra_json_schema={
            "propertyNames": {"enum": list(get_args(Reward))},
            "not": {"additionalProperties": {"maximum": 0}},
        },
    ),
]


class EventError(ValueError):
    """An event that cannot be applied: names the reason, the field, the value and the remedy."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """What every event has. `topic` and `key_fields` say where its records go."""

    topic: ClassVar[str] = ""
    key_fields: ClassVar[tuple[str, ...]] = ("user_id",)

    schema_version: Annotated[Literal[1], Meta(description="version of this contract")]
    event_id: Annotated[Id, Meta(description="unique; the same id means the same event")]
    ts: Ts

    @classmethod
    def new(cls, **fields: Any) -> Self:
        """Build an event, filling `schema_version`, `event_id` (random) and `ts` (now) where absent.

        Raises EventError when a field breaks the contract.
        """
        fields.setdefault("schema_version", SCHEMA_VERSION)
        fields.setdefault("event_id", uuid.uuid4().hex)
        fields.setdefault("ts", time.time_ns() // 1_000_000)
        try:
            return msgspec.convert(fields, cls)
        except msgspec.ValidationError as error:
            raise EventError("invalid_field", f"{cls.__name__}: {error}") from error

    @classmethod
    def key_name(cls) -> str:
        """What the record key is made of, such as `user_id`."""
        return "/".join(cls.key_fields)

    @property
    def key(self) -> bytes:
        """The record key, UTF-8: equal keys meet in one partition."""
        return "/".join(str(getattr(self, field)) for field in self.key_fields).encode()


class Click(Event, frozen=True, kw_only=True):
    """A user looked at an item, or put it into the cart."""

    topic: ClassVar[str] = "clicks"
    user_id: Id
    item_id: Id
    kind: Literal["click", "cart"] = "click"
    request_id: Annotated[Id | None, Meta(description="the recommendation that led here")] = None
    scene: Id | None = None


class Impression(Event, frozen=True, kw_only=True):
    """Items that a user was shown, best first."""

    topic: ClassVar[str] = "impressions"
    user_id: Id
    item_ids: Annotated[list[Id], Meta(min_length=1, max_length=100)]
    request_id: Annotated[Id | None, Meta(description="the recommendation that was shown")] = None
    scene: Id | None = None


class Purchase(Event, frozen=True, kw_only=True):
    """A user bought an item."""

    topic: ClassVar[str] = "purchases"
    user_id: Id
    item_id: Id
    price: Price
    quantity: Annotated[int, Meta(ge=1, le=MAX_QUANTITY)] = 1
    order_id: Id | None = None
    request_id: Annotated[Id | None, Meta(description="the recommendation that led here")] = None
    commission: Annotated[
        Annotated[float, Meta(ge=0)] | None,
        Meta(description="what is earned by it in all, in the shop's currency"),
    ] = None


class Trigger(Event, frozen=True, kw_only=True):
    """A request for recommendations: the page that a user opened, and from which item."""

    topic: ClassVar[str] = "triggers"
    request_id: Id
    user_id: Id
    item_id: Annotated[Id | None, Meta(description="the item that opened the page")] = None
    scene: Id | None = None
    k: Annotated[int, Meta(ge=1, le=100, description="how many items to answer with")] = 10
    exclude: Annotated[Items, Meta(description="items that must not be in the answer")] = []
    reply_to: Annotated[
        Annotated[str, Meta(pattern=rf"^[A-Za-z0-9._-]{{1,249}}{_END}")] | None,
        Meta(description="a second topic for the answer"),
    ] = None
    preferences: Preferences | None = None

    def __post_init__(self) -> None:
        """Raises ValueError, which becomes an EventError, where preferences ask for nothing."""
        if self.preferences and not any(self.preferences.values()):
            raise ValueError("`preferences` has no weight above 0; leave it out, or give one")


class RankedItem(msgspec.Struct, frozen=True):
    """One recommended item, best first. `score` is the log-probability of its SID, 0 or less; where the
    fallback is `popular`, 0, -1, -2, ... by place."""

    item_id: Id
    sid: Sid
    score: float


class Recommendation(Event, frozen=True, kw_only=True):
    """The answer to a trigger: ranked items, and the bundle and arm that made them."""

    topic: ClassVar[str] = "recommendations"
    request_id: Id
    user_id: Id
    items: list[RankedItem]
    bundle: Annotated[str | None, Meta(description="id of the bundle; null when no model answered")] = None
    arm: Annotated[str | None, Meta(description="share of users that this bundle serves")] = None
    trial: Annotated[str | None, Meta(description="the trial that the arm belongs to")] = None
    fallback: Annotated[
        Literal["popular", "history_only", "trigger_only", "no_catalog"] | None,
        Meta(description="null: history and trigger were used; else what replaced them"),
    ] = None
    scene: Id | None = None
    trigger_item_id: Id | None = None
    conditions: Annotated[
        dict[str, int] | None,
        Meta(
            description="what preferences asked of the model: 1 of a click or a purchase, the bin of a price "
            "or a commission, from 0; null: nothing was asked, or the bundle knows no rewards"
        ),
    ] = None


Scheme = Literal["purchased_over_clicked", "purchased_over_shown", "clicked_over_shown"]


class PreferencePair(Event, frozen=True, kw_only=True):
    """One chosen SID and 1 to K rejected SIDs under the same history. `event_id` is a content hash."""

    topic: ClassVar[str] = "preferences"
    user_id: Id
    scheme: Scheme
    codebook: Id
    chosen_item: Id
    chosen: Sid
    rejected_items: Annotated[list[Id], Meta(min_length=1)]
    rejected: Annotated[list[Sid], Meta(min_length=1)]
    history: Annotated[list[Sid], Meta(description="SIDs before the decision, oldest first")]
    trigger: Annotated[Sid | None, Meta(description="SID of the item that opened the page")] = None
    request_id: Id | None = None
    scene: Annotated[Id | None, Meta(description="the page or placement of the request")] = None


class CatalogItem(Event, frozen=True, kw_only=True):
    """An item that may be advertised; the newest record of an item_id counts."""

    topic: ClassVar[str] = "catalog"
    key_fields: ClassVar[tuple[str, ...]] = ("item_id",)
    item_id: Id
    title: Annotated[str, Meta(min_length=1, max_length=1000)]
    category: str = ""
    brand: str = ""
    price: Price | None = None
    commission_rate: Rate | None = None
    active: Annotated[bool, Meta(description="false: never recommended")] = True


class Exploration(Event, frozen=True, kw_only=True):
    """The first place of an answer, drawn by chance from the best candidates: what off-policy estimates need.

    Beams are deterministic, so nothing else that is shown tells how another model would have done.
    """

    topic: ClassVar[str] = "explorations"
    request_id: Id
    user_id: Id
    item_id: Annotated[Id, Meta(description="the item that was drawn, and shown first")]
    propensity: Annotated[float, Meta(gt=0, le=1, description="the chance with which it was drawn")]
    chosen: Annotated[int, Meta(ge=0, description="its place among the candidates")]
    candidates: Annotated[
        list[Sid], Meta(min_length=1, max_length=1000, description="what could be drawn, best first")
    ]
    scores: Annotated[
        list[float], Meta(description="log-probability of each candidate under the bundle that answered")
    ]
    temperature: Annotated[float, Meta(gt=0, description="of the softmax of scores that was drawn from")]
    prompt: Annotated[list[Sid], Meta(description="SIDs that the bundle was given, oldest first")]
    codebook: Id
    bundle: Id
    arm: Id
    trial: Id
    context: Annotated[
        dict[str, str],
        Meta(
            description="scene, profile and rewards that the bundle was given: `scene`, "
            "`profile.<attribute>`, `reward.<name>`"
        ),
    ] = {}


class UserProfile(Event, frozen=True, kw_only=True):
    """Attributes of a user for the prompt; the newest record of a user_id counts."""

    topic: ClassVar[str] = "users"
    user_id: Id
    attributes: Annotated[dict[str, str], Meta(max_length=32)]


class SidAssignment(Event, frozen=True, kw_only=True):
    """An item's SID under one codebook. Append-only: an SID is never moved or reused."""

    topic: ClassVar[str] = "sids"
    # Both, so that compaction keeps the SIDs of every codebook: histories are translated by them, and a
    # bundle of an earlier codebook is served by them. Readers take all from the value, so a record that was
    # keyed by the item alone, as earlier versions did, counts as well.
    key_fields: ClassVar[tuple[str, ...]] = ("codebook", "item_id")
    item_id: Id
    sid: Sid
    codebook: Annotated[Id, Meta(description="content hash of the codebook")]


class Arm(msgspec.Struct, frozen=True):
    """A share of users served by one bundle."""

    name: Literal["champion", "challenger-sft", "challenger-dpo", "anchor"]
    bundle: Id
    weight: Rate
    version: Annotated[str, Meta(description="model version in the registry")]


class Rollout(Event, frozen=True, kw_only=True):
    """Which bundles serve which share of users, from now on; the newest record counts."""

    topic: ClassVar[str] = "rollout"
    key_fields: ClassVar[tuple[str, ...]] = ("name",)
    name: Annotated[Id, Meta(description="the recommender that this is about")]
    action: Literal["start", "trial", "promote", "reject", "inconclusive", "rollback"]
    trial: Annotated[Id, Meta(description="what outcomes are summed under: one set of arms and weights")]
    salt: Annotated[
        Id | None,
        Meta(description="salt of the users' assignment, one for all steps of a trial; null: the trial"),
    ] = None
    step: Annotated[
        Rate | None,
        Meta(description="share of their full weights that challengers have; 0: shadow; null: no ramp"),
    ] = None
    arms: Annotated[list[Arm], Meta(min_length=1, max_length=8)]
    decision: Annotated[dict[str, Any] | None, Meta(description="the decision record, if any")] = None


class DeadLetter(Event, frozen=True, kw_only=True):
    """A record that could not be applied, with its bytes, where it came from and why."""

    topic: ClassVar[str] = "dead-letters"
    key_fields: ClassVar[tuple[str, ...]] = ("source",)
    source: Annotated[str, Meta(description="topic of the record")]
    partition: Annotated[int, Meta(ge=0, le=2**31 - 1)]
    offset: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    key_base64: str | None
    value_base64: str | None
    stage: Annotated[str, Meta(description="what refused it")]
    reason: str
    detail: str
    attempt: Annotated[int, Meta(ge=1)] = 1


EVENTS: tuple[type[Event], ...] = (
    Click, Impression, Purchase, Trigger, Recommendation, Exploration, PreferencePair, CatalogItem,
    UserProfile, SidAssignment, Rollout, DeadLetter,
)  # fmt: skip
BY_TOPIC: dict[str, type[Event]] = {kind.topic: kind for kind in EVENTS}

E = TypeVar("E", bound=Event)
_encoder = msgspec.json.Encoder()
_decoders: dict[type[Event], msgspec.json.Decoder[Any]] = {}
_FIELD = re.compile(r" - at (?:`key` in )?`\$\.?(.*?)`$")


def encode(event: Event) -> bytes:
    """The event as compact UTF-8 JSON."""
    return _encoder.encode(event)


def decode(kind: type[E], value: bytes | None, now_ms: int | None = None) -> E:
    """Read one record's value as `kind`.

    `now_ms` is the wall clock that `ts` is compared with (milliseconds, default: now). Raises EventError with
    reason `empty`, `not_utf8`, `malformed_json`, `unknown_schema_version`, `invalid_field` or
    `timestamp_in_future`.
    """
    if not value:
        raise EventError("empty", f"a {kind.__name__} has no value; send a JSON object")
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.json.Decoder(kind)
    try:
        # The decoder does not look at the bytes of fields that it ignores.
        event: E = decoder.decode(value.decode())
    except UnicodeDecodeError as error:
        raise EventError(
            "not_utf8", f"byte {error.start} of the value is not UTF-8; send UTF-8 JSON"
        ) from error
    except msgspec.ValidationError as error:
        raise _explain(kind, value, str(error)) from error
    except msgspec.DecodeError as error:
        raise EventError("malformed_json", f"{error}; send one JSON object of {kind.__name__}") from error
    except RecursionError as error:
        raise EventError("malformed_json", "the value is nested too deep; send a flat JSON object") from error
    now = time.time_ns() // 1_000_000 if now_ms is None else now_ms
    if event.ts > now + MAX_AHEAD_MS:
        raise EventError(
            "timestamp_in_future",
            f"ts is {event.ts}, more than a day ahead of now ({now}); "
            "send milliseconds since 1970-01-01 UTC of when it happened",
        )
    return event


def _explain(kind: type[Event], value: bytes, message: str) -> EventError:
    location = _FIELD.search(message)
    field = location.group(1) if location else ""
    problem = message[: location.start()] if location else message
    try:
        raw = msgspec.json.decode(value)
    except (msgspec.DecodeError, RecursionError):
        raw = None  # the value went wrong further on; what is said of the field above still holds
    # What is wrong may lie inside a field: `preferences[...]`, `items[...].score`.
    name = re.split(r"[.\[]", field)[0]
    text = repr(raw.get(name))[:80] if isinstance(raw, dict) and name in raw else "absent"
    if field == "schema_version" or "missing required field `schema_version`" in problem:
        version = repr(raw.get("schema_version", "absent")) if isinstance(raw, dict) else "another"
        return EventError(
            "unknown_schema_version",
            f"schema_version is {version}; this version of sidstream reads {SCHEMA_VERSION}",
        )
    where = f"{field} is {text}: " if field else ""
    return EventError("invalid_field", f"{where}{problem}; see the schema of {kind.__name__}")
