"""A user's profile as bytes, and the one rule by which it changes: the newest event counts.

Layout 1, big-endian: version u8 | ts_ms u48 | hash of the event's id, 8 bytes | attributes as a JSON object.
Newest by `ts`, of equal ones by that hash, so that any order of the same events, with any repeats, gives the
same profile.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Final

import msgspec

from streams.errors import SidstreamError
from streams.events import UserProfile
from streams.state.redisdb import RedisScript

VERSION: Final = 1
_HEAD: Final = 15

# KEYS profile | ARGV packed profile, or '' for a user that was deleted. Returns 1 where it changed
# the profile. Bytes are compared one by one: `<` on strings is strcoll, whose order depends on the locale.
STORE_IF_NEWER: Final = RedisScript("""
local byte = string.byte
if ARGV[1] == '' then return redis.call('DEL', KEYS[1]) end
local stored = redis.call('GETRANGE', KEYS[1], 0, 14)
if stored ~= '' then
  if byte(stored, 1) ~= 1 then
    return redis.error_reply('SIDSTREAM profile of layout ' .. byte(stored, 1))
  end
  for at = 2, 15 do
    local old, new = byte(stored, at), byte(ARGV[1], at)
    if old ~= new then
      if new < old then return 0 end
      break
    end
  end
end
redis.call('SET', KEYS[1], ARGV[1])
return 1
""")


def newest_order_key(event: UserProfile) -> bytes:
    """Profiles of one user are compared by these bytes; the greatest is the newest."""
    id_bytes = event.event_id.encode("utf-8", "surrogatepass")
    return event.ts.to_bytes(6, "big") + blake2b(id_bytes, digest_size=8).digest()


def pack_profile(event: UserProfile) -> bytes:
    """The bytes of a profile."""
    return bytes((VERSION,)) + newest_order_key(event) + msgspec.json.encode(event.attributes)


def unpack_profile(value: bytes | None) -> dict[str, str]:
    """The attributes of a packed profile; {} for None. Raises SidstreamError for other bytes."""
    if value is None:
        return {}
    if value[:1] != bytes((VERSION,)):
        raise SidstreamError(
            f"a profile has layout {value[:1].hex() or 'none'}, this version reads {VERSION:02}: "
            "replay the topic users into an empty Redis"
        )
    try:
        return msgspec.json.decode(value[_HEAD:], type=dict[str, str])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise SidstreamError(
            f"a profile is damaged ({error}): replay the topic users into an empty Redis"
        ) from error
