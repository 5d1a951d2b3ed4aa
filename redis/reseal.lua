-- Puts other octets in the place of sealed stubs of one bucket, if they are still those that the caller opened: for key
-- rotation the same stub sealed with another key; for a stub whose readable revision is not that of its sealed part the
-- same octets again.
-- KEYS: the bucket, the bucket's tombstones, then the stubs' keys. ARGV: for each stub the sealed octets as they were ("" where there were none)
-- and as they shall be, and the revision and the epoch of their stub for the readable fields, "" to leave these alone.
-- Returns for each stub 1, or 0 where it has changed meanwhile or is gone: nothing deleted comes back.
local resealed = {}
for i = 3, #KEYS do
  local old, new, revision, epoch = ARGV[4 * i - 11], ARGV[4 * i - 10], ARGV[4 * i - 9], ARGV[4 * i - 8]
  if redis.call('EXISTS', KEYS[i]) == 1 and (redis.call('HGET', KEYS[i], 'sealed') or '') == old then
    if new ~= old then
      redis.call('HSET', KEYS[i], 'sealed', new)
    end
    if revision ~= '' then
      redis.call('HSET', KEYS[i], 'revision', revision)
    end
    if epoch ~= '' then
      redis.call('HSET', KEYS[i], 'epoch', epoch)
    end
    resealed[i - 2] = 1
  else
    resealed[i - 2] = 0
  end
end
return resealed
