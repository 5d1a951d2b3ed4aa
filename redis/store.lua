-- Initiate and Update Stub: stores stubs of one bucket, but none over a newer revision of it, and none of a session
-- that has ended or moved on (redis/delete.lua).
-- KEYS: the bucket, then the stubs' keys. ARGV: a MessagePack array that holds for each stub an array of strings, the
-- readable fields in the order below, "" where there is none (one argument, since clients are slow at many); then the
-- sealed stubs.
-- Returns for each stub 1, or 0 where the bank holds a newer revision or the session has ended.
local fields = {'id_i', 'id_r', 'spi_i', 'spi_r', 'proposal', 'connection', 'vips', 'established', 'expires',
                'revision'}
local EXPIRES, REVISION = 9, 10
local AT_ONCE = 2000 -- members and scores in one command: Lua's stack bounds its arguments

local call = redis.call
local bucket = KEYS[1]
local ended = 'ike:gone:' .. string.sub(bucket, 11)
local any_ended = call('EXISTS', ended) == 1
local stubs = cmsgpack.unpack(ARGV[1])
local stored, members, m = {}, {}, 0
for i = 1, #stubs do
  local key, values = KEYS[i + 1], stubs[i]
  local spi = string.sub(key, -16)
  local held = tonumber(call('HGET', key, 'revision') or nil)
  if held and held > tonumber(values[REVISION]) or any_ended and call('ZSCORE', ended, spi) then
    stored[i] = 0
  else
    local hash, h, gone = {'sealed', ARGV[i + 1]}, 2, {}
    for f = 1, #fields do
      if values[f] ~= '' then
        hash[h + 1], hash[h + 2] = fields[f], values[f]
        h = h + 2
      else
        gone[#gone + 1] = fields[f]
      end
    end
    call('HSET', key, unpack(hash))
    if held and #gone > 0 then
      call('HDEL', key, unpack(gone))
    end
    call('EXPIREAT', key, values[EXPIRES])
    members[m + 1], members[m + 2] = values[EXPIRES], spi
    m = m + 2
    stored[i] = 1
  end
end
for first = 1, m, AT_ONCE do
  call('ZADD', bucket, unpack(members, first, math.min(first + AT_ONCE - 1, m)))
end

-- Redis lets the stubs expire by itself; their names in the bucket go here, and the bucket with its last stub.
call('ZREMRANGEBYSCORE', bucket, '-inf', call('TIME')[1])
local last = call('ZRANGE', bucket, -1, -1, 'WITHSCORES')
if last[2] then
  call('EXPIREAT', bucket, last[2])
end
return stored
