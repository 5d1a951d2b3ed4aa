-- Key rotation: puts stubs of one bucket, sealed anew, in the place of what they were opened from.
-- KEYS: the bucket, then the stubs' keys. ARGV: for each stub the sealed octets as they were, and as they shall be.
-- Returns for each stub 1, or 0 where it has changed meanwhile or is gone: nothing deleted comes back.
local resealed = {}
for i = 2, #KEYS do
  if redis.call('HGET', KEYS[i], 'sealed') == ARGV[2 * i - 3] then
    redis.call('HSET', KEYS[i], 'sealed', ARGV[2 * i - 2])
    resealed[i - 1] = 1
  else
    resealed[i - 1] = 0
  end
end
return resealed
