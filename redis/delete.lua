-- Delete Stub: deletes stubs of one bucket, each only if the bank holds no newer revision than the caller saw.
-- KEYS: the bucket, then the stubs' keys. ARGV: for each stub the greatest revision to delete.
-- Returns for each stub 1, or 0 where there was none, or a newer one.
-- An ended session stays ended: its SPI is kept in ike:gone:{...} for as long as its stub would have lived, and
-- redis/store.lua refuses it. A stub of this bank's that a client holds is refused by the same sign.
local DAY = 86400 -- for a stub that is not here (any more), whose expiry is not known

local gone = 'ike:gone:' .. string.sub(KEYS[1], 11)
local now = tonumber(redis.call('TIME')[1])
local deleted = {}
for i = 2, #KEYS do
  local held = redis.call('HMGET', KEYS[i], 'revision', 'expires')
  local revision = tonumber(held[1] or nil)
  if revision and revision > tonumber(ARGV[i - 1]) then
    deleted[i - 1] = 0
  else
    local spi = string.sub(KEYS[i], -16)
    -- first what can be refused: while a Cluster moves the bucket, this key may be at another node already
    redis.call('ZADD', gone, 'GT', tonumber(held[2] or nil) or now + DAY, spi)
    redis.call('ZREM', KEYS[1], spi)
    deleted[i - 1] = redis.call('DEL', KEYS[i])
  end
end

redis.call('ZREMRANGEBYSCORE', gone, '-inf', now)
local last = redis.call('ZRANGE', gone, -1, -1, 'WITHSCORES')
if last[2] then
  redis.call('EXPIREAT', gone, last[2])
end
return deleted
