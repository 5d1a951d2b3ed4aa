-- Initiate and Update Stub: stores stubs of one bucket, but none over a newer revision of it, and none of a session
-- that has ended or moved on (redis/delete.lua).
-- KEYS: the bucket, the bucket's tombstones, then the stubs' keys. ARGV: a MessagePack array that holds for each stub an
-- array of strings, the readable fields in the order below, "" where there is none (one argument, since clients are
-- slow at many); then the sealed stubs.
-- Returns for each stub 1; 0 where the bank holds a newer revision by its readable field, which the caller compares
-- with the sealed part, since anyone with write access to the bank can change it; 2 where the session has ended; 3 where
-- another gateway has taken the session over, by its readable epoch, which the caller compares too.
local fields = {'id_i', 'id_r', 'eap_id', 'spi_i', 'spi_r', 'proposal', 'connection', 'vips', 'established', 'expires',
                'revision', 'owner', 'epoch'}
local EXPIRES, REVISION, EPOCH = 10, 11, 13
local IN_ONE_COMMAND = 2000 -- members and scores: Lua's stack bounds a command's arguments
local LONGEST = 400 * 86400 -- seconds that a bucket lives at most without another stub

local call = redis.call
local bucket, gone = KEYS[1], KEYS[2]
local any_gone = call('EXISTS', gone) == 1
local stubs = cmsgpack.unpack(ARGV[1])
local stored, members, m = {}, {}, 0
for i = 1, #stubs do
  local key, values = KEYS[i + 2], stubs[i]
  local spi = string.sub(key, -16)
  local held = tonumber(call('HGET', key, 'revision') or nil)
  if any_gone and call('ZSCORE', gone, spi) then
    stored[i] = 2
  elseif held and values[EPOCH] ~= '' and (tonumber(call('HGET', key, 'epoch') or nil) or 0) > tonumber(values[EPOCH]) then
    stored[i] = 3
  elseif held and held > tonumber(values[REVISION]) then
    stored[i] = 0
  else
    local hash, h, left_out = {'sealed', ARGV[i + 1]}, 2, {}
    for f = 1, #fields do
      if values[f] ~= '' then
        hash[h + 1], hash[h + 2] = fields[f], values[f]
        h = h + 2
      else
        left_out[#left_out + 1] = fields[f]
      end
    end
    call('HSET', key, unpack(hash))
    if held and #left_out > 0 then
      call('HDEL', key, unpack(left_out))
    end
    call('EXPIREAT', key, values[EXPIRES])
    members[m + 1], members[m + 2] = values[EXPIRES], spi
    m = m + 2
    stored[i] = 1
  end
end
for first = 1, m, IN_ONE_COMMAND do
  call('ZADD', bucket, unpack(members, first, math.min(first + IN_ONE_COMMAND - 1, m)))
end

-- Redis lets the stubs expire by itself; their names in the bucket go here, and the bucket with its last stub.
local now = tonumber(call('TIME')[1])
call('ZREMRANGEBYSCORE', bucket, '-inf', now)
local last = call('ZRANGE', bucket, -1, -1, 'WITHSCORES')
if last[2] then
  call('EXPIREAT', bucket, string.format('%.0f', math.min(tonumber(last[2]), now + LONGEST)))
end
return stored
