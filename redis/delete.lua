#!lua flags=allow-oom
-- Delete Stub: deletes stubs of one bucket, whatever revision the bank holds, and leaves a tombstone of each. One that
-- another gateway has taken over stays.
-- KEYS: the bucket, the bucket's tombstones, then the stubs' keys. ARGV: for each stub when it would have expired (Unix
-- seconds, by its sealed part), 0 where the caller does not know; where gateways share the address, a space and the epoch
-- of the session at the caller.
-- Returns for each stub 1; 0 where there was none; 3 where it was taken over, by its readable epoch.
-- Nothing that a stub's readable fields say is used: anyone with write access to the bank can change them. An ended
-- session stays ended: its SPI is kept among the tombstones for as long as its stub would have lived, and
-- redis/store.lua refuses it. Full memory does not stop a deletion (allow-oom): it makes room.
local UNKNOWN = 30 * 86400 -- seconds, where the caller does not know
local CLOCKS = 60 -- seconds by which the clocks of gateways may differ
local LONGEST = 400 * 86400 -- seconds that a key of tombstones lives at most without another deletion

local bucket, gone = KEYS[1], KEYS[2]
local now = tonumber(redis.call('TIME')[1])
local deleted = {}
for i = 3, #KEYS do
  local given, epoch = string.match(ARGV[i - 2], '^(%d+) ?(%d*)$')
  local expires = tonumber(given) or 0
  if expires <= 0 then
    expires = now + UNKNOWN
  end
  local spi = string.sub(KEYS[i], -16)
  if epoch and epoch ~= '' and (tonumber(redis.call('HGET', KEYS[i], 'epoch') or nil) or 0) > tonumber(epoch) then
    deleted[i - 2] = 3
  else
    -- first what can be refused: while a Cluster moves the bucket, this key may be at another node already
    redis.call('ZADD', gone, 'GT', string.format('%.0f', expires + CLOCKS), spi)
    redis.call('ZREM', bucket, spi)
    deleted[i - 2] = redis.call('DEL', KEYS[i])
  end
end

redis.call('ZREMRANGEBYSCORE', gone, '-inf', now)
local last = redis.call('ZRANGE', gone, -1, -1, 'WITHSCORES')
if last[2] then
  redis.call('EXPIREAT', gone, string.format('%.0f', math.min(tonumber(last[2]), now + LONGEST)))
end
return deleted
