-- Reads one key, and deletes what is larger than anything that a gateway writes: each reader would have to take all of it.
-- KEYS: the key. ARGV: how many octets a value or a member has at most; a command that answers with a value or a flat list
-- (GET, HGET, HMGET, ZRANGE), or ZSCAN; what follows the key in that command.
-- Returns the values, of ZSCAN the next cursor in front of them, and how many were too large: their key was deleted, of a
-- sorted set these members alone.
local most, command = tonumber(ARGV[1]), ARGV[2]
local reply = redis.call(command, KEYS[1], unpack(ARGV, 3))
local scan = command == 'ZSCAN'
local values = scan and reply[2] or type(reply) == 'table' and reply or {reply}
local width = (scan or command == 'ZRANGE' and ARGV[#ARGV] == 'WITHSCORES') and 2 or 1
local fit, large = scan and {reply[1]} or {}, 0
for i = 1, #values, width do
  if not values[i] or #values[i] <= most then
    for v = i, i + width - 1 do
      fit[#fit + 1] = values[v]
    end
  elseif scan or command == 'ZRANGE' then
    redis.call('ZREM', KEYS[1], values[i])
    large = large + 1
  else
    redis.call('DEL', KEYS[1])
    return {{}, 1}
  end
end
return {fit, large}
