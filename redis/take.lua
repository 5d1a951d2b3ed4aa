-- Takes sessions over: puts the sealed stub of a new owner in the place of the one that the caller opened, if it is still
-- there. Of two gateways that take a session at the same time one succeeds.
-- KEYS: the bucket, the bucket's tombstones, then the stubs' keys. ARGV: for each stub the sealed octets as they were and
-- as they shall be, then the new readable fields: revision, owner, epoch.
-- Returns for each stub 1; 0 where it has changed meanwhile, or is gone; 2 where the session has ended.
local WIDTH = 5
local taken = {}
for i = 3, #KEYS do
  local at = (i - 3) * WIDTH
  if redis.call('ZSCORE', KEYS[2], string.sub(KEYS[i], -16)) then
    taken[i - 2] = 2
  elseif redis.call('HGET', KEYS[i], 'sealed') == ARGV[at + 1] then
    redis.call('HSET', KEYS[i], 'sealed', ARGV[at + 2], 'revision', ARGV[at + 3], 'owner', ARGV[at + 4],
               'epoch', ARGV[at + 5])
    taken[i - 2] = 1
  else
    taken[i - 2] = 0
  end
end
return taken
