-- Names a gateway among those that have had a heartbeat lately, by the clock of this server: one gateway's wrong clock
-- makes it forget no other one.
-- Returns 1 for one that was not in the set, as after FLUSHALL; 0 otherwise.
-- KEYS: the set of gateways. ARGV: the gateway; seconds after which one without a heartbeat is forgotten.
local now = tonumber(redis.call('TIME')[1])
local new = redis.call('ZADD', KEYS[1], now, ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - ARGV[2])
-- no gateway wrote what lies in the future
redis.call('ZREMRANGEBYSCORE', KEYS[1], now + ARGV[2], '+inf')
return new
