-- Download Stub, and lists for people: fields of the stubs of one bucket, some at a time.
-- KEYS: the bucket. ARGV: cursor ('0' to begin with), about how many, what the keys of the bucket's stubs begin with, then
-- the names of the fields.
-- Returns the next cursor ('0' at the end), then for each stub its SPI in hex and the fields; where its key is no hash, an
-- error in the place of the first field. A stub that is there all the time comes at least once.
local page = redis.call('ZSCAN', KEYS[1], ARGV[1], 'COUNT', ARGV[2])
local prefix = ARGV[3]
local width = #ARGV - 3
local MOST = 1000001 -- octets of a field: no gateway writes more, and none reads it
local MEMBER = 64 -- octets of a member that are told: those of gateways have 16
local reply = {page[1]}
for i = 1, #page[2], 2 do
  local spi = page[2][i]
  local values = redis.pcall('HMGET', prefix .. spi, unpack(ARGV, 4))
  reply[#reply + 1] = string.sub(spi, 1, MEMBER)
  if values.err then
    values = {values}
  end
  for v = 1, width do
    local fits = values[v] and (type(values[v]) ~= 'string' or #values[v] <= MOST)
    reply[#reply + 1] = fits and values[v] or false
  end
end
return reply
