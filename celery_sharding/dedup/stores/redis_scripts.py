"""The Lua scripts that change a claim's record in Redis: the state machine of `dedup.claims`, on the server.

Each touches one hash, KEYS[1], judges time by the server's `TIME`, and can be repeated with the same token. They run on
Redis 5 and later, and on Valkey.
"""

_NOW = """
local clock = redis.call('TIME')
local now = clock[1] * 1000000 + clock[2]
local function text(number) return string.format('%.0f', number) end
"""

# ARGV: token, task id, owner, lease (microseconds), time to live (milliseconds), token to evict or ''. Returns the
# fencing token of a claim that was given, as the number that costs least to read; else what stands in its way.
CLAIM = (
    _NOW
    + """
local r = redis.call('HMGET', KEYS[1], 'version', 'state', 'token', 'fencing', 'until', 'task', 'owner', 'attempts')
local state, fencing = r[2], 0
if not r[1] then
    if state or r[3] or r[4] or r[8] then return {'damaged', 'it has no version'} end
else
    if r[1] ~= '1' then return {'damaged', 'its version is ' .. r[1]} end
    fencing = tonumber(r[4])
    if not fencing then return {'damaged', 'it has no fencing token'} end
    if state == 'done' then
        local result = redis.call('HGET', KEYS[1], 'result')
        if not result then return {'damaged', 'it has no result'} end
        return {'done', result}
    end
    if state == 'running' or state == 'parked' then
        local lapses = tonumber(r[5])
        if not (lapses and r[3] and r[6] and r[7]) then return {'damaged', 'it has no holder'} end
        if state == 'running' and r[3] == ARGV[1] then return fencing end
        if lapses > now and r[3] ~= ARGV[6] and not (state == 'parked' and r[6] == ARGV[2]) then
            return {'running', r[3], r[7], text(lapses - now), state}
        end
    elseif state ~= 'released' then
        return {'damaged', 'its state is unknown'}
    end
end
if now > fencing then fencing = now else fencing = fencing + 1 end
redis.call('HSET', KEYS[1], 'version', '1', 'state', 'running', 'token', ARGV[1], 'task', ARGV[2], 'owner', ARGV[3],
    'until', text(now + ARGV[4]), 'ttl', ARGV[5], 'fencing', text(fencing), 'attempts', text((r[8] or 0) + 1))
redis.call('PEXPIRE', KEYS[1], text(math.ceil(ARGV[4] / 1000) + ARGV[5]))
return fencing
"""
)

# ARGV: token, lease (microseconds), new state.
HOLD = (
    _NOW
    + """
local r = redis.call('HMGET', KEYS[1], 'state', 'token', 'ttl')
if r[1] ~= 'running' or r[2] ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 'state', ARGV[3], 'until', text(now + ARGV[2]))
redis.call('PEXPIRE', KEYS[1], text(math.ceil(ARGV[2] / 1000) + r[3]))
return 1
"""
)

# ARGV: token, result, time to live (milliseconds). The hash is written anew because Redis keeps a hash that once held
# a value above 64 bytes, such as the owner, in its large encoding for ever.
COMMIT = """
local r = redis.call('HMGET', KEYS[1], 'state', 'token', 'fencing', 'task', 'attempts')
if r[2] ~= ARGV[1] then return 0 end
if r[1] == 'done' then return 1 end
if r[1] ~= 'running' then return 0 end
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], 'version', '1', 'state', 'done', 'token', r[2], 'fencing', r[3], 'task', r[4],
    'attempts', r[5], 'result', ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return 1
"""

# ARGV: token. The record stays until it expires, for its fencing token.
RELEASE = """
local r = redis.call('HMGET', KEYS[1], 'state', 'token')
if r[2] ~= ARGV[1] or not (r[1] == 'running' or r[1] == 'parked') then return 0 end
redis.call('HSET', KEYS[1], 'state', 'released')
redis.call('HDEL', KEYS[1], 'token', 'task', 'owner', 'until')
return 1
"""

SHOW = (
    _NOW
    + """
local r = redis.call('HMGET', KEYS[1], 'version', 'state', 'fencing', 'attempts', 'until', 'owner', 'task')
if redis.call('EXISTS', KEYS[1]) == 0 then return {} end
return {text(now), r[1] or '', r[2] or '', r[3] or '', r[4] or '', r[5] or '', r[6] or '',
    redis.call('HSTRLEN', KEYS[1], 'result'), redis.call('PTTL', KEYS[1]), r[7] or ''}
"""
)

# ARGV: '1' to forget what is held or damaged, too; or ''.
FORGET = (
    _NOW
    + """
local kind = redis.call('TYPE', KEYS[1])['ok']
if kind == 'none' then return {'forgotten'} end
local r = {}
if kind == 'hash' then r = redis.call('HMGET', KEYS[1], 'version', 'state', 'until', 'fencing') end
local held = r[2] == 'running' or r[2] == 'parked'
local lapses = tonumber(r[3] or nil)
local sound = r[1] == '1' and r[4] and (held and lapses or r[2] == 'done' or r[2] == 'released')
if ARGV[1] == '' then
    if not sound then return {'damaged', 'its version is ' .. tostring(r[1]) .. ', its state ' .. tostring(r[2])} end
    if held and lapses > now then return {'held'} end
end
if sound then
    redis.call('HSET', KEYS[1], 'state', 'released')
    redis.call('HDEL', KEYS[1], 'token', 'task', 'owner', 'until', 'result')
else
    redis.call('DEL', KEYS[1])
end
return {'forgotten'}
"""
)
