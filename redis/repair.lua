#!lua flags=allow-oom
-- Deletes a key of the bank that is not of its type: nothing that a gateway stored is in it.
-- KEYS: the key. ARGV: a command that only reads and that its type takes, then what follows the key in that command.
-- Returns 1, or 0 where the key is as it should be.
local answer = redis.pcall(ARGV[1], KEYS[1], unpack(ARGV, 2))
if type(answer) == 'table' and answer.err and string.find(answer.err, 'WRONGTYPE', 1, true) then
  return redis.call('DEL', KEYS[1])
end
return 0
