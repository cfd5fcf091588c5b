#!lua name=rolloutq
--
-- The atomic steps of the queue: here what they share; take.lua, lease.lua, sweep.lua and control.lua go on, and all five
-- are loaded as one library. Each step is called with the one key P = rollout:{<pool>}; keys.py lists the keys built from it.
-- They use server time only. Redis does not roll a function back, so each step reads and checks first and writes then.
-- Every step may be repeated after a lost answer: it finds its own traces (job id and hash, nonce, fence) and answers alike.
--
-- A job's reply hash while it lives:
--   status sha protocol lane entry queued_ms        where its one stream entry is
--   inbox run reply_ttl_ms deadline_ms max_staleness  from its fields; inbox: of all who submitted it, the newest four
--   attempts fence worker started_ms                the lease that holds it, or held it last
--   crashes fails handbacks cancel alone            how earlier attempts ended; wish to cancel; shall run alone
--   goes_on                                         the turn of its session that its prompt goes on from; empty: none
--   kept:<sample> checkpoints                       tokens of each sample in the progress stream; how often it grew
--   events                                          what happened to earlier attempts: `<ms> <what> <whom>;` ...

local VERSION = 7
local GROUP, BELL = 'workers', 'bell'
local LANES = { 'resume', 'high', 'normal', 'low' }
local ROOMS = { 'delayed', 'parked', 'alone' } -- where a queued job waits whose entry was read
local LANE = { resume = true, high = true, normal = true, low = true }
local TURNS = { 'high', 'normal', 'high', 'high', 'normal', 'high', 'low', 'high', 'normal', 'high', 'high', 'normal', 'high' }
local REPLY_TTL_MS = 6 * 3600 * 1000
local REPLY_TTL = REPLY_TTL_MS .. '' -- as text; `ends` says why
local RUN_TTL_MS = 24 * 3600 * 1000
local INBOX_TTL_MS, INBOX_MOST = 3600 * 1000, 100000
local LISTENERS = 4
local DEAD_MOST = 10000
local TOMBSTONE_AFTER_MS = 600 * 1000
local WORKER_FORGOTTEN_MS = 600 * 1000
local PROGRESS_TTL_MS = 600 * 1000
local CLAIM_MS = 30 * 1000
local RATE_WINDOW_MS = 5000
local FULL_LEAST_MS, FULL_MOST_MS = 100, 30000
local SEGMENT = 10 -- values of one segment in a call
local ENDING, TURN = 13, 4 -- values of one end in a call, before its segments; of one turn of a session after them
local BACKLOG_JOBS = 100000
local TAKE_BYTES = 4 * 1024 * 1024
local FIELDS_MOST = 64

local ERRORS = { -- code -> HTTP status, type in OpenAI's body, type in Anthropic's
  invalid_request = { 400, 'invalid_request_error', 'invalid_request_error' },
  job_conflict = { 409, 'invalid_request_error', 'invalid_request_error' },
  cancelled = { 499, 'server_error', 'api_error' },
  deadline_exceeded = { 504, 'server_error', 'timeout_error' },
  staleness_exceeded = { 410, 'server_error', 'api_error' },
  worker_lost = { 500, 'server_error', 'api_error' },
  engine_failed = { 500, 'server_error', 'api_error' },
}

local LATE = { -- code -> what the holder of the job is told, what the reply says
  deadline_exceeded = { 'expire', 'the deadline of job %s passed %s' },
  staleness_exceeded = { 'stale', 'job %s fell behind the wanted policy version by more than its max_staleness %s' },
}

local function now_ms()
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

local function unprepared(P)
  return redis.call('EXISTS', P) == 0 and redis.error_reply('UNPREPARED pool key ' .. P .. ' is missing')
end

-- Field and value, field and value, ... as a map: of a whole list, or of some arguments.
local function map_of(flat, from, upto)
  local map = {}
  for i = from or 1, upto or #flat, 2 do map[flat[i]] = flat[i + 1] end
  return map
end

-- One value of such a list, as the map has it.
local function value_of(flat, field)
  for i = #flat - 1, 1, -2 do
    if flat[i] == field then return flat[i + 1] end
  end
end

-- Messages are made of fixed words, numbers and checked ids, so they need no escaping.
local function error_body(protocol, code, message, id)
  local known = ERRORS[code]
  if string.sub(protocol or '', 1, 7) == 'claude.' then
    return '{"type":"error","error":{"type":"' .. known[3] .. '","message":"' .. message .. '"},"request_id":"' .. id .. '"}'
  end
  return '{"error":{"message":"' .. message .. '","type":"' .. known[2] .. '","param":null,"code":"' .. code .. '"}}'
end

-- The ends of jobs in one step: what concerns many of them at once is gathered here and written by `settle`. `at` is the
-- time as text: to make a number into an argument costs as much as a small command.
local function ends(now)
  return { at = tostring(now), leases = {}, deadlines = {}, entries = {}, inboxes = {}, runs = {} }
end

local function gather(map, key, value)
  local list = map[key]
  if list then list[#list + 1] = value else map[key] = { value } end
end

local function settle(P, gone)
  if #gone.leases > 0 then redis.call('ZREM', P .. ':leases', unpack(gone.leases)) end
  if #gone.deadlines > 0 then redis.call('ZREM', P .. ':deadlines', unpack(gone.deadlines)) end
  for lane, entries in pairs(gone.entries) do
    redis.call('XACK', P .. ':jobs:' .. lane, GROUP, unpack(entries))
    redis.call('XDEL', P .. ':jobs:' .. lane, unpack(entries))
  end
  for inboxes, ids in pairs(gone.inboxes) do
    for inbox in string.gmatch(inboxes, '%S+') do
      local key = P .. ':inbox:' .. inbox
      redis.call('RPUSH', key, unpack(ids))
      redis.call('LTRIM', key, -INBOX_MOST, -1)
      redis.call('PEXPIRE', key, INBOX_TTL_MS)
    end
  end
  for run, ttl in pairs(gone.runs) do redis.call('PEXPIRE', P .. ':run:' .. run, ttl) end
end

-- What a job's reply hash says, but for body and state: what nearly every step asks is read at once, the rest when asked.
local LATER = {
  __index = function(held, name)
    local value = redis.call('HMGET', held.key, name)[1]
    held[name] = value
    return value
  end,
}

local function held_of(P, id)
  local key = P .. ':reply:' .. id
  local held = redis.call('HMGET', key, 'status', 'fence', 'lane', 'entry', 'deadline_ms', 'max_staleness', 'checkpoints',
    'attempts', 'queued_ms', 'inbox', 'run', 'reply_ttl_ms')
  return setmetatable({ key = key, status = held[1], fence = held[2], lane = held[3], entry = held[4], deadline_ms = held[5],
    max_staleness = held[6], checkpoints = held[7], attempts = held[8], queued_ms = held[9], inbox = held[10], run = held[11],
    reply_ttl_ms = held[12] }, LATER)
end

-- The one place where a job ends. `result` is a flat list of the reply's fields, `last` one of what else ends its
-- stream.
local function conclude(P, gone, id, held, result, last)
  local ttl = held.reply_ttl_ms or REPLY_TTL
  redis.call('HSET', held.key, 'finished_ms', gone.at, unpack(result))
  redis.call('PEXPIRE', held.key, ttl)
  gone.leases[#gone.leases + 1] = id
  if held.deadline_ms then gone.deadlines[#gone.deadlines + 1] = id end
  if held.entry then gather(gone.entries, held.lane, held.entry) end
  if held.inbox then gather(gone.inboxes, held.inbox, id) end
  if held.run then gone.runs[held.run] = math.max(RUN_TTL_MS, ttl, gone.runs[held.run] or 0) end
  if held.checkpoints then
    redis.call('XADD', P .. ':progress:' .. id, '*', 'end', result[2], unpack(last or {}))
    redis.call('PEXPIRE', P .. ':progress:' .. id, math.min(PROGRESS_TTL_MS, ttl)) -- a new job of the id begins without
  end
end

-- Write down how an attempt ended; the last attempt needs none, its fields tell.
local function note(held, now, what)
  redis.call('HSET', held.key, 'events', (held.events or '') ..
    (held.started_ms or now) .. ' taken by ' .. (held.worker or '?') .. ';' .. now .. ' ' .. what .. ';')
end

local function kept_tokens(held)
  if not held.checkpoints then return 0 end
  local flat, total = redis.call('HGETALL', held.key), 0
  for i = 1, #flat, 2 do
    if string.sub(flat[i], 1, 5) == 'kept:' then total = total + tonumber(flat[i + 1]) end
  end
  return total
end

local function error_reply(id, held, status, code, message)
  return { 'status', status, 'code', ERRORS[code][1], 'error', code, 'body', error_body(held.protocol, code, message, id) }
end

local function conclude_error(P, gone, id, held, status, code, message)
  conclude(P, gone, id, held, error_reply(id, held, status, code, message))
end

local function bury(P, id, held, reason, detail)
  local copy = held.entry and redis.call('XRANGE', P .. ':jobs:' .. held.lane, held.entry, held.entry)[1]
  redis.call('XADD', P .. ':dead', 'MAXLEN', '~', DEAD_MOST, '*', 'job', id, 'reason', reason, 'attempts', held.attempts or 0,
    'lane', held.lane or '', 'workers', held.worker or '', 'events', held.events or '', 'error', detail, unpack(copy and copy[2] or {}))
end

-- A whole number as a worker accepts it; any other is for the worker to refuse.
local function whole(text, least)
  local number = text and #text <= 13 and string.find(text, '^%d+$') and tonumber(text)
  return number and number >= least and number
end

-- A job comes to be, at a time as text: its reply hash, deadline and place in its run.
local function bear(P, id, lane, entry, fields, sha, at)
  local hash = { 'status', 'queued', 'sha', sha, 'protocol', fields.protocol or 'openai.chat', 'lane', lane, 'entry', entry, 'queued_ms', at }
  if fields.inbox then hash[#hash + 1] = 'inbox'; hash[#hash + 1] = fields.inbox end
  if fields.run then hash[#hash + 1] = 'run'; hash[#hash + 1] = fields.run end
  local ttl, timeout, staleness = whole(fields.reply_ttl_ms, 1), whole(fields.timeout_ms, 1), whole(fields.max_staleness, 0)
  if ttl then hash[#hash + 1] = 'reply_ttl_ms'; hash[#hash + 1] = ttl end
  if staleness then hash[#hash + 1] = 'max_staleness'; hash[#hash + 1] = staleness end
  if timeout then
    local deadline = at + timeout
    hash[#hash + 1] = 'deadline_ms'; hash[#hash + 1] = deadline
    redis.call('ZADD', P .. ':deadlines', deadline, id)
  end
  redis.call('HSET', P .. ':reply:' .. id, unpack(hash))
  if fields.run then
    redis.call('ZADD', P .. ':run:' .. fields.run, at, id)
    redis.call('PERSIST', P .. ':run:' .. fields.run)
  end
end

-- Wake whoever listens; it may be lost or forbidden, and is never the truth.
local function ring(P, whom)
  redis.pcall('PUBLISH', 'rollout:bell:' .. string.match(P, '{(.*)}'), whom)
end

local function stop(P, gone, id, held)
  conclude_error(P, gone, id, held, 'cancelled', 'cancelled', 'job ' .. id .. ' was cancelled')
end

-- A job waits for another attempt: alone if it is suspect, else in the resume lane, where the next take that has not waited
-- finds it first. There its copy keeps the id it was born with. A job that shall stop gets no other attempt.
local function requeue(P, gone, id, held, now)
  if held.cancel then return stop(P, gone, id, held) end
  if held.alone then
    redis.call('HSET', P .. ':reply:' .. id, 'status', 'queued')
    redis.call('ZADD', P .. ':alone', now, id)
    gone.leases[#gone.leases + 1] = id
    return ring(P, 'alone')
  end
  local stream = P .. ':jobs:' .. held.lane
  local copy = redis.call('XRANGE', stream, held.entry, held.entry)[1]
  if not copy then
    conclude_error(P, gone, id, held, 'failed', 'worker_lost', 'the stream entry of job ' .. id .. ' is gone; submit it again under another id')
    return
  end
  local again = { 'id', id }
  for i = 1, #copy[2], 2 do
    if copy[2][i] ~= 'id' then again[#again + 1] = copy[2][i]; again[#again + 1] = copy[2][i + 1] end
  end
  local entry = redis.call('XADD', P .. ':jobs:resume', '*', unpack(again))
  redis.call('HSET', P .. ':reply:' .. id, 'status', 'queued', 'lane', 'resume', 'entry', entry)
  gather(gone.entries, held.lane, held.entry)
  gone.leases[#gone.leases + 1] = id
end

local function leave_waiting(P, id)
  for _, room in ipairs(ROOMS) do redis.call('ZREM', P .. ':' .. room, id) end
end

local function waits(P, id)
  for _, room in ipairs(ROOMS) do
    if redis.call('ZSCORE', P .. ':' .. room, id) then return true end
  end
  return false
end

local function due(key, upto, most)
  return redis.call('ZRANGEBYSCORE', key, '-inf', upto, 'LIMIT', 0, most)
end

-- Let jobs of a room go on, up to a score. -> how many
local function promote(P, room, upto, now, most)
  local gone, ids = ends(now), due(P .. ':' .. room, upto, most)
  for _, id in ipairs(ids) do
    local held = held_of(P, id)
    redis.call('ZREM', P .. ':' .. room, id)
    if held.status == 'queued' then requeue(P, gone, id, held, now) end
  end
  settle(P, gone)
  return #ids
end

-- -> the library's version: an older one never replaces a newer
local function version()
  return VERSION
end

local function step(name, callback, flags)
  redis.register_function({ function_name = 'rolloutq_' .. name, callback = callback, flags = flags })
end

step('version', version, { 'no-writes', 'allow-oom' })
