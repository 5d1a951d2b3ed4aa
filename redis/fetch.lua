-- Download Stub, and lists for people: fields of the stubs of one bucket, some at a time.
-- KEYS: the bucket. ARGV: cursor ('0' to begin with), about how many, then the names of the fields.
-- Returns the next cursor ('0' at the end), then for each stub its SPI in hex and the fields. A stub that is there all
-- the time comes at least once.
local page = redis.call('ZSCAN', KEYS[1], ARGV[1], 'COUNT', ARGV[2])
local prefix = 'ike:stub:' .. string.sub(KEYS[1], 11) .. ':'
local reply = {page[1]}
for i = 1, #page[2], 2 do
  local spi = page[2][i]
  local values = redis.call('HMGET', prefix .. spi, unpack(ARGV, 3))
  reply[#reply + 1] = spi
  for v = 1, #values do
    reply[#reply + 1] = values[v]
  end
end
return reply
