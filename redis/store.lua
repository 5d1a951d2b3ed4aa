-- Initiate and Update Stub: stores stubs of one bucket, but none over a newer revision of it, and none of a session
-- that has ended or moved on (redis/delete.lua).
-- KEYS: the bucket, then the stubs' keys. ARGV: a MessagePack array that holds for each stub an array of strings, the
-- readable fields in the order below, "" where there is none (one argument, since clients are slow at many); then the
-- sealed stubs.
-- Returns for each stub 1, or 0 where the bank holds a newer revision or the session has ended.
local fields = {'id_i', 'id_r', 'spi_i', 'spi_r', 'proposal', 'connection', 'vips', 'established', 'expires',
                'revision'}
local EXPIRES, REVISION = 9, 10

local bucket = KEYS[1]
local ended = 'ike:gone:' .. string.sub(bucket, 11)
local stored = {}
for i, values in ipairs(cmsgpack.unpack(ARGV[1])) do
  local key = KEYS[i + 1]
  local held = tonumber(redis.call('HGET', key, 'revision') or nil)
  if held and held > tonumber(values[REVISION]) or redis.call('ZSCORE', ended, string.sub(key, -16)) then
    stored[i] = 0
  else
    local hash, gone = {'sealed', ARGV[i + 1]}, {}
    for f, name in ipairs(fields) do
      if values[f] ~= '' then
        hash[#hash + 1] = name
        hash[#hash + 1] = values[f]
      else
        gone[#gone + 1] = name
      end
    end
    redis.call('HSET', key, unpack(hash))
    if held and #gone > 0 then
      redis.call('HDEL', key, unpack(gone))
    end
    redis.call('EXPIREAT', key, values[EXPIRES])
    redis.call('ZADD', bucket, values[EXPIRES], string.sub(key, -16))
    stored[i] = 1
  end
end

-- Redis lets the stubs expire by itself; their names in the bucket go here, and the bucket with its last stub.
redis.call('ZREMRANGEBYSCORE', bucket, '-inf', redis.call('TIME')[1])
local last = redis.call('ZRANGE', bucket, -1, -1, 'WITHSCORES')
if last[2] then
  redis.call('EXPIREAT', bucket, last[2])
end
return stored
