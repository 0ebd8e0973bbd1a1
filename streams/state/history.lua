-- Apply interactions to one packed history (layout and rules: streams/state/history.py, whose `apply_changes` gives
-- the same bytes). Strings are never compared with `<`: that is strcoll, whose order depends on the locale.
-- KEYS[1] history | ARGV: 1 head (6 bytes), 2 incarnations (2 x 4 bytes), 3 max_length, 4 max_age_ms,
-- 5 changes: per change source u8 (0 none, 1 clicks, 2 purchases), offset u48, entry
-- Returns {applied, skipped by the fence}, or {-1, 0} for a history under another codebook: it is not changed.
local byte, sub = string.byte, string.sub

local function u48(s, at)
  local a, b, c, d, e, f = byte(s, at, at + 5)
  return ((((a * 256 + b) * 256 + c) * 256 + d) * 256 + e) * 256 + f
end

local function pack48(n)
  local out = {}
  for i = 6, 1, -1 do
    out[i] = string.char(n % 256)
    n = math.floor(n / 256)
  end
  return table.concat(out)
end

local function before(a, b)
  for i = 1, #a do
    local x, y = byte(a, i), byte(b, i)
    if x ~= y then return x < y end
  end
  return false
end

local head, incarnations, changes = ARGV[1], ARGV[2], ARGV[5]
local max_length, max_age = tonumber(ARGV[3]), tonumber(ARGV[4])
local size = 10 + 2 * byte(head, 2)

local fences = {string.rep('\0', 10), string.rep('\0', 10)}
local entries, n = {}, 0
local waiting = '' -- the block of waiting entries with its length; copied as it is
local stored = redis.call('GET', KEYS[1])
if stored then
  if byte(stored, 1) ~= 1 and byte(stored, 1) ~= 2 then
    return redis.error_reply('SIDSTREAM history of layout ' .. byte(stored, 1) .. ' in ' .. KEYS[1])
  end
  if sub(stored, 2, 6) ~= sub(head, 2, 6) then return {-1, 0} end
  fences = {sub(stored, 7, 16), sub(stored, 17, 26)}
  local first = 27
  if byte(stored, 1) == 2 then
    first = 31 + u48('\0\0' .. sub(stored, 27, 30), 1)
    waiting = sub(stored, 27, first - 1)
  end
  for at = first, #stored, size do
    n = n + 1
    entries[n] = sub(stored, at, at + size - 1)
  end
end

local next_offsets, incarnation_bytes = {0, 0}, {}
for s = 1, 2 do
  incarnation_bytes[s] = sub(incarnations, s * 4 - 3, s * 4)
  if sub(fences[s], 1, 4) == incarnation_bytes[s] then next_offsets[s] = u48(fences[s], 5) end
end
local next_after = {next_offsets[1], next_offsets[2]}

local applied, skipped = 0, 0
for at = 1, #changes, size + 7 do
  local source, offset = byte(changes, at), u48(changes, at + 1)
  if source > 0 and offset < next_offsets[source] then
    skipped = skipped + 1
  else
    applied = applied + 1
    if source > 0 and offset >= next_after[source] then next_after[source] = offset + 1 end
    local entry = sub(changes, at + 7, at + 6 + size)
    local place = n
    while place > 0 and before(entry, entries[place]) do place = place - 1 end
    if place == 0 or entries[place] ~= entry then
      table.insert(entries, place + 1, entry)
      n = n + 1
    end
  end
end
if applied == 0 then return {0, skipped} end

for s = 1, 2 do
  if next_after[s] > next_offsets[s] then fences[s] = incarnation_bytes[s] .. pack48(next_after[s]) end
end
local first = math.max(1, n - max_length + 1)
if n > 0 then
  local oldest = u48(entries[n], 1) - max_age
  while u48(entries[first], 1) < oldest do first = first + 1 end
end
local layout = waiting == '' and '\1' or '\2'
redis.call('SET', KEYS[1],
  layout .. sub(head, 2, 6) .. fences[1] .. fences[2] .. waiting .. table.concat(entries, '', first, n))
return {applied, skipped}
