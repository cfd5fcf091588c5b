#!lua name=rolloutq
--
-- The atomic steps of the queue. Each is called with the one key P = rollout:{<pool>}; keys.py lists the keys built from it.
-- They use server time only. Redis does not roll a function back, so each step reads and checks first and writes then.
-- Every step may be repeated after a lost answer: it finds its own traces (job id and hash, nonce, fence) and answers alike.
--
-- A job's reply hash while it lives:
--   status sha protocol lane entry queued_ms        where its one stream entry is
--   inbox run reply_ttl_ms deadline_ms max_staleness  from its fields
--   attempts fence worker started_ms                the lease that holds it, or held it last
--   crashes fails handbacks cancel alone            how earlier attempts ended; wish to cancel; shall run alone
--   kept:<sample> checkpoints                       tokens of each sample in the progress stream; how often it grew
--   events                                          what happened to earlier attempts: `<ms> <what> <whom>;` ...

local VERSION = 5
local GROUP, BELL = 'workers', 'bell'
local LANES = { 'resume', 'high', 'normal', 'low' }
local ROOMS = { 'delayed', 'parked', 'alone' } -- where a queued job waits whose entry was read
local LANE = { resume = true, high = true, normal = true, low = true }
local TURNS = { 'high', 'normal', 'high', 'high', 'normal', 'high', 'low', 'high', 'normal', 'high', 'high', 'normal', 'high' }
local REPLY_TTL_MS = 6 * 3600 * 1000
local RUN_TTL_MS = 24 * 3600 * 1000
local INBOX_TTL_MS, INBOX_MOST = 3600 * 1000, 100000
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
  map[key] = map[key] or {}
  table.insert(map[key], value)
end

local function settle(P, gone)
  if #gone.leases > 0 then redis.call('ZREM', P .. ':leases', unpack(gone.leases)) end
  if #gone.deadlines > 0 then redis.call('ZREM', P .. ':deadlines', unpack(gone.deadlines)) end
  for lane, entries in pairs(gone.entries) do
    redis.call('XACK', P .. ':jobs:' .. lane, GROUP, unpack(entries))
    redis.call('XDEL', P .. ':jobs:' .. lane, unpack(entries))
  end
  for inbox, ids in pairs(gone.inboxes) do
    local key = P .. ':inbox:' .. inbox
    redis.call('RPUSH', key, unpack(ids))
    redis.call('LTRIM', key, -INBOX_MOST, -1)
    redis.call('PEXPIRE', key, INBOX_TTL_MS)
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
  local ttl = held.reply_ttl_ms or REPLY_TTL_MS
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

-- A job waits for another attempt: alone if it is suspect, else in the resume lane, where the next take finds it first.
-- There its copy keeps the id it was born with. A job that shall stop gets no other attempt.
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

local function well_formed(id)
  return #id <= 128 and string.find(id, '^[%w%._:~%-]+$') ~= nil
end

local function backlog(P)
  local waiting = -redis.call('ZCARD', P .. ':leases')
  for _, lane in ipairs(LANES) do waiting = waiting + redis.call('XLEN', P .. ':jobs:' .. lane) end
  return waiting
end

-- How long it takes until so many jobs have ended, at the rate that sweep has seen.
local function retry_ms(P, jobs)
  local per_s = tonumber(redis.call('HGET', P, 'ends_per_s')) or 0
  if per_s <= 0 then return FULL_LEAST_MS * 10 end
  return math.floor(math.max(FULL_LEAST_MS, math.min(FULL_MOST_MS, 1000 * jobs / per_s)))
end

-- args: (id, lane, sha, number of field values, field, value, ...)...
-- -> for each job the status it has now: `queued` if accepted (or accepted before), else the known job's status,
--    or why it was not accepted: `conflict`, `full <ms until there may be room>`, `invalid` (its id or lane)
local function enqueue(keys, args)
  local P = keys[1]
  local missing = unprepared(P)
  if missing then return missing end
  local at, out, i, refused = tostring(now_ms()), {}, 1, 0
  redis.call('HINCRBY', P, 'enqueues', 1) -- so that a WAIT after it waits, also where all its jobs were known
  local room = (tonumber(redis.call('HGET', P, 'backlog')) or BACKLOG_JOBS) - backlog(P)
  while i <= #args do
    local id, lane, sha, count = args[i], args[i + 1], args[i + 2], tonumber(args[i + 3])
    local key = P .. ':reply:' .. id
    local known = redis.call('HMGET', key, 'status', 'sha')
    if not well_formed(id) or lane == 'resume' or not LANE[lane] then
      out[#out + 1] = 'invalid'
    elseif known[1] and known[2] ~= sha then
      out[#out + 1] = 'conflict'
    elseif known[1] then
      local fields = map_of(args, i + 4, i + 3 + count)
      if fields.inbox and (known[1] == 'queued' or known[1] == 'running') then
        redis.call('HSET', key, 'inbox', fields.inbox)
      end
      out[#out + 1] = known[1]
    elseif room <= 0 then
      refused = refused + 1
      out[#out + 1] = 'full ' .. retry_ms(P, refused)
    else
      local entry = redis.call('XADD', P .. ':jobs:' .. lane, '*', 'id', id, unpack(args, i + 4, i + 3 + count))
      bear(P, id, lane, entry, map_of(args, i + 4, i + 3 + count), sha, at)
      room = room - 1
      out[#out + 1] = 'queued'
    end
    i = i + 4 + count
  end
  return out
end

-- What a newly read entry means: nil if there is nothing to begin, else the job's id and what is held of it.
local function admit(P, gone, lane, read, fields, now)
  local entry, flat = read[1], read[2]
  local id = fields.id or entry
  if not well_formed(id) then
    bear(P, entry, lane, entry, fields, '', gone.at)
    conclude_error(P, gone, entry, held_of(P, entry), 'failed', 'invalid_request', '`id`: 1 to 128 of A-Z a-z 0-9 . _ : ~ -')
    return
  end
  local held = held_of(P, id)
  if not held.status then
    local born = string.match(entry, '^%d+')
    bear(P, id, lane, entry, fields, redis.sha1hex((fields.protocol or 'openai.chat') .. '\0' .. (fields.body or '')), born)
    held = held_of(P, id)
    if #flat <= 2 * FIELDS_MOST then return id, held end
    conclude_error(P, gone, id, held, 'failed', 'invalid_request', 'a stream entry has at most ' .. FIELDS_MOST .. ' fields')
    return
  end
  if held.status == 'queued' and held.lane == lane and held.entry == entry then return id, held end
  local sha = redis.sha1hex((fields.protocol or 'openai.chat') .. '\0' .. (fields.body or ''))
  if sha == held.sha then -- a second copy of a known job
    gather(gone.entries, lane, entry)
    return
  end
  bear(P, entry, lane, entry, fields, sha, gone.at)
  conclude_error(P, gone, entry, held_of(P, entry), 'failed', 'job_conflict', 'job id ' .. id .. ' belongs to another body; choose another id')
end

-- Read up to `most` entries of one lane, in portions that keep the bytes of one call bounded: nobody knows how large the
-- next entry is, so the first portion is one and each may be twice the one before.
local function read_lane(P, worker, lane, most, bytes)
  local stream, got, biggest, portion = P .. ':jobs:' .. lane, {}, 64 * 1024, 1
  while #got < most and bytes > 0 do
    portion = math.max(1, math.min(portion, most - #got, math.floor(bytes / biggest)))
    local answer = redis.call('XREADGROUP', 'GROUP', GROUP, worker, 'COUNT', portion, 'STREAMS', stream, '>')
    local entries = answer and answer[1] and answer[1][2] or {}
    for _, entry in ipairs(entries) do
      local size = 0
      for i = 2, #entry[2], 2 do size = size + #entry[2][i] end
      biggest, bytes = math.max(biggest, size), bytes - size
      got[#got + 1] = entry
    end
    if #entries < portion then return got, bytes, true end
    portion = 2 * portion
  end
  return got, bytes, false
end

-- How many entries each lane may give of `slots`: what was handed back first, then 8:4:1, going round across calls.
local function shares(P, slots)
  local turn, share = tonumber(redis.call('HGET', P, 'turn')) or 0, { high = 0, normal = 0, low = 0 }
  for k = 1, slots do
    local lane = TURNS[(turn + k) % #TURNS + 1]
    share[lane] = share[lane] + 1
  end
  redis.call('HSET', P, 'turn', (turn + slots) % #TURNS)
  return share
end

local function read_lanes(P, worker, slots)
  local bytes, left, drained, batch = TAKE_BYTES, slots, {}, {}
  local function read(lane, most)
    if most <= 0 or bytes <= 0 or drained[lane] then return end
    local got
    got, bytes, drained[lane] = read_lane(P, worker, lane, most, bytes)
    for _, entry in ipairs(got) do batch[#batch + 1] = { lane, entry } end
    left = left - #got
  end
  read('resume', left)
  if left > 0 then
    local share = shares(P, left)
    for _, lane in ipairs({ 'high', 'normal', 'low' }) do read(lane, share[lane]) end
    for _, lane in ipairs({ 'high', 'normal', 'low' }) do read(lane, left) end
  end
  return batch, left > 0 and bytes > 0
end

local function left_ms(held, now)
  return held.deadline_ms and math.max(0, held.deadline_ms - now) or ''
end

local function row_of(P, id, held, fence, now, flat)
  local kept = held.checkpoints and redis.call('XRANGE', P .. ':progress:' .. id, '-', '+') or {}
  return { held.entry, id, fence, held.lane, left_ms(held, now), flat, kept, held.queued_ms or now }
end

-- Why a job shall not go on, if there is a reason: the code of its error.
local function late(P, held, now)
  if held.deadline_ms and tonumber(held.deadline_ms) <= now then return 'deadline_exceeded' end
  if not (held.max_staleness and held.oldest_version) then return end
  local wanted = tonumber(redis.call('HGET', P .. ':desired', 'weights')) or 0
  if wanted - tonumber(held.oldest_version) > tonumber(held.max_staleness) then return 'staleness_exceeded' end
end

local function late_reply(id, held, code, when)
  return error_reply(id, held, 'expired', code, string.format(LATE[code][2], id, when))
end

-- A job waits for weights that no taker has yet: no step looks at it before one has them.
local function park(P, id, held, min_version, now)
  local what = 'parked for policy version ' .. min_version
  redis.call('ZADD', P .. ':parked', min_version, id)
  if string.find(held.events or '', what .. ';', 1, true) then return end
  redis.call('HSET', P .. ':reply:' .. id, 'events', (held.events or '') .. now .. ' ' .. what .. ';')
end

-- A job whose worker died twice runs alone, so that it takes no neighbours along if it is to blame. One worker at a
-- time claims it, takes nothing else until it is idle, and gets it then. -> id to begin, whether to hold back
local function lone(P, worker, holding, now)
  local id = redis.call('ZRANGE', P .. ':alone', 0, 0)[1]
  if not id then return end
  local claim = redis.call('HMGET', P, 'alone_worker', 'alone_until_ms')
  if claim[1] and claim[1] ~= worker and tonumber(claim[2]) > now then return end
  redis.call('HSET', P, 'alone_worker', worker, 'alone_until_ms', now + CLAIM_MS)
  if holding > 0 then return nil, true end
  redis.call('ZREM', P .. ':alone', id)
  redis.call('HDEL', P, 'alone_worker', 'alone_until_ms')
  return id, true
end

local function taken_before(P, worker, nonce, now)
  local last = redis.call('HMGET', P .. ':worker:' .. worker, 'take_nonce', 'take_ids')
  if last[1] ~= nonce then return end
  local jobs = {}
  for id in string.gmatch(last[2], '%S+') do
    local held = held_of(P, id)
    if held.status == 'running' and held.fence == held.attempts .. ':' .. nonce then
      local copy = redis.call('XRANGE', P .. ':jobs:' .. held.lane, held.entry, held.entry)[1]
      if copy then jobs[#jobs + 1] = row_of(P, id, held, held.fence, now, copy[2]) end
    end
  end
  return jobs
end

-- args: worker, nonce, slots, lease_ms, policy version, jobs that the worker holds
-- -> {gate, {{entry, id, fence, lane, ms to its deadline, {field, value, ...}, {checkpoint entries}}...}, hold}
-- Reading and beginning are one step. hold is 1 where the worker shall take nothing else until it holds no job.
local function take(keys, args)
  local P, worker, nonce, slots, version = keys[1], args[1], args[2], tonumber(args[3]), tonumber(args[5])
  local missing = unprepared(P)
  if missing then return missing end
  local gates = redis.call('HMGET', P .. ':desired', 'gate', 'gate@' .. worker)
  local gate = gates[2] or gates[1] or 'missing'
  if gate ~= 'open' then return { gate, {}, 0 } end
  local before = taken_before(P, worker, nonce, now_ms())
  if before then return { gate, before, redis.call('HGET', P .. ':worker:' .. worker, 'take_hold') == '1' and 1 or 0 } end

  local now, jobs, leases, ids = now_ms(), {}, {}, {}
  local gone, expiry = ends(now), tostring(now + tonumber(args[4]))
  promote(P, 'parked', version, now, slots)
  local alone, hold = lone(P, worker, tonumber(args[6]), now)
  local batch, drained = {}, false
  if alone then
    local held = held_of(P, alone)
    local copy = held.entry and redis.call('XRANGE', P .. ':jobs:' .. held.lane, held.entry, held.entry)[1]
    if copy and held.status == 'queued' then batch = { { held.lane, copy } } end
  elseif not hold then
    batch, drained = read_lanes(P, worker, slots)
  end
  for _, read in ipairs(batch) do
    local lane, entry, flat = read[1], read[2][1], read[2][2]
    local fields = map_of(flat)
    local id, held = admit(P, gone, lane, read[2], fields, now)
    local code, min_version = id and late(P, held, now), whole(fields.min_version, 0) or 0
    if not id then -- answered, or a second copy
    elseif code then
      conclude(P, gone, id, held, late_reply(id, held, code, 'before it began'))
    elseif min_version > version then
      park(P, id, held, min_version, now)
    else
      local attempts = tostring((tonumber(held.attempts) or 0) + 1)
      local fence = attempts .. ':' .. nonce
      redis.call('HSET', held.key, 'status', 'running', 'attempts', attempts, 'fence', fence, 'worker', worker, 'started_ms', gone.at)
      leases[#leases + 1] = expiry; leases[#leases + 1] = id
      ids[#ids + 1] = id
      jobs[#jobs + 1] = row_of(P, id, held, fence, now, flat)
    end
  end
  if #ids > 0 then
    redis.call('ZADD', P .. ':leases', unpack(leases))
    redis.call('HSET', P .. ':worker:' .. worker, 'take_nonce', nonce, 'take_ids', table.concat(ids, ' '), 'take_hold', hold and 1 or 0)
  end
  settle(P, gone)
  if drained then -- nothing waits: whoever listens need not be told of what was taken
    for _, lane in ipairs(LANES) do redis.pcall('XGROUP', 'SETID', P .. ':jobs:' .. lane, BELL, '$') end
  end
  return { gate, jobs, hold and 1 or 0 }
end

-- Append segments to a job's checkpoint, leaving out what it has already. A gap (the server lost some: it failed over to
-- an older copy) keeps nothing of that sample. Frames are not cut: a segment that has some comes as it came before, or
-- counts as a gap. Whoever follows the job is told of frames. -> whether there was no gap
local function keep(P, gone, id, inbox, args, from, count)
  local key, whole, grown, framed = P .. ':reply:' .. id, true, false, false
  for at = from, from + (count - 1) * SEGMENT, SEGMENT do
    local index, start, tokens, version = args[at], tonumber(args[at + 1]), tonumber(args[at + 2]), args[at + 3]
    local kept = tonumber(redis.call('HGET', key, 'kept:' .. index)) or 0
    if start > kept then
      whole = false
    elseif start + tokens > kept then
      local skip, wide = kept - start, #args[at + 6] / tokens
      local frames = args[at + 9]
      if frames ~= '' and skip > 0 then
        whole = false
      else
        redis.call('XADD', P .. ':progress:' .. id, '*', 'i', index, 's', kept, 'v', version,
          't', string.sub(args[at + 4], skip * 4 + 1), 'p', string.sub(args[at + 5], skip * 4 + 1),
          'ti', string.sub(args[at + 6], skip * wide + 1), 'tp', string.sub(args[at + 7], skip * wide + 1), 'f', args[at + 8],
          unpack(frames ~= '' and { 'sse', frames } or {}))
        redis.call('HSET', key, 'kept:' .. index, start + tokens)
        local oldest = tonumber(redis.call('HGET', key, 'oldest_version'))
        if not oldest or tonumber(version) < oldest then redis.call('HSET', key, 'oldest_version', version) end
        grown, framed = true, framed or frames ~= ''
      end
    end
  end
  if grown then
    redis.call('HINCRBY', key, 'checkpoints', 1)
    redis.call('HDEL', key, 'crashes', 'alone') -- a job that gets on is no poison
  end
  if framed and inbox then gather(gone.inboxes, inbox, '+' .. id) end
  return whole
end

-- args: lease_ms, (id, fence, number of segments,
--   (index, start, tokens, version, ids, logprobs, top ids, top logprobs, finish, frames)...)...
-- -> for each `held`, `lost`, `cancel`, `expire`, `stale`, or `gap`: held, but send the segments from their beginning
local function renew(keys, args)
  local P, now, out, i = keys[1], now_ms(), {}, 2
  local gone = ends(now)
  while i <= #args do
    local id, count = args[i], tonumber(args[i + 2])
    local held = redis.call('HMGET', P .. ':reply:' .. id, 'status', 'fence', 'cancel', 'deadline_ms', 'max_staleness', 'inbox')
    if held[1] ~= 'running' or held[2] ~= args[i + 1] then
      out[#out + 1] = 'lost'
    else
      redis.call('ZADD', P .. ':leases', now + tonumber(args[1]), id)
      local whole = keep(P, gone, id, held[6], args, i + 3, count)
      local oldest = held[5] and redis.call('HGET', P .. ':reply:' .. id, 'oldest_version')
      local code = late(P, { deadline_ms = held[4], max_staleness = held[5], oldest_version = oldest }, now)
      out[#out + 1] = held[3] and 'cancel' or (code and LATE[code][1]) or (whole and 'held' or 'gap')
    end
    i = i + 3 + count * SEGMENT
  end
  settle(P, gone)
  return out
end

-- Keep the answers of a turn in its session: `n:<rollout id>` the node, `l:<rollout id>` its number, time and parent,
-- `h:<mark>` the first turn whose conversation has that mark. An answer whose parent is gone is not kept: its session was
-- released while it was generated.
local function remember(P, session, ttl, now, args, from, count)
  local key = P .. ':session:' .. session
  for at = from, from + (count - 1) * TURN, TURN do
    local id, parent, mark, node = args[at], args[at + 1], args[at + 2], args[at + 3]
    local orphan = parent ~= '' and not redis.call('HGET', key, 'l:' .. parent)
    if not orphan and redis.call('HSETNX', key, 'n:' .. id, node) == 1 then
      local number = redis.call('HINCRBY', key, 'turns', 1)
      redis.call('HINCRBY', key, 'bytes', #node)
      redis.call('HSET', key, 'l:' .. id, number .. ' ' .. now .. ' ' .. parent)
      if mark ~= '' then redis.call('HSETNX', key, 'h:' .. mark, id) end
    end
  end
  redis.call('PEXPIRE', key, math.max(REPLY_TTL_MS, ttl))
end

-- args: session, marks of the beginnings of a conversation, the longest first
-- -> {turns and bytes of the session, {rollout id, node, ...} from the longest beginning that it knows back to its root}
local function recall(keys, args)
  local key, path = keys[1] .. ':session:' .. args[1], {}
  local size = redis.call('HMGET', key, 'turns', 'bytes')
  local marks = {}
  for i = 2, #args do marks[#marks + 1] = 'h:' .. args[i] end
  local id
  for _, known in ipairs(#marks > 0 and redis.call('HMGET', key, unpack(marks)) or {}) do id = id or known end
  while id and id ~= '' do
    local found = redis.call('HMGET', key, 'n:' .. id, 'l:' .. id)
    path[#path + 1] = id
    path[#path + 1] = found[1]
    id = string.match(found[2], '^%d+ %d+ (.*)$')
  end
  return { tonumber(size[1]) or 0, tonumber(size[2]) or 0, path }
end

-- args: (id, fence, status, code, body, state, newest, oldest policy version of its tokens, number of values that follow:
--   0, or error, last frames, tokens of its stream, number of segments, segments as in renew, session, number of its turns,
--   (rollout id, parent, mark, node)...)... -> 1 accepted, also if repeated; 0 the lease was lost
-- An answer that is too late is none: its reply is `expired` and keeps the state; the stream gets no last frames, the
-- session no turn.
local function finish(keys, args)
  local P, now, out, i = keys[1], now_ms(), {}, 1
  local gone = ends(now)
  while i <= #args do
    local id, held = args[i], held_of(P, args[i])
    local mine = held.fence == args[i + 1]
    local more, count, turns, after = tonumber(args[i + 8]), 0, 0, nil
    if more > 0 then
      count = tonumber(args[i + 12])
      after = i + ENDING + count * SEGMENT
      turns = tonumber(args[after + 1])
    end
    if mine and held.status == 'running' then
      if args[i + 7] ~= '' then held.oldest_version = args[i + 7] end
      local code = args[i + 2] == 'completed' and late(P, held, now)
      local result = code and late_reply(id, held, code, 'while it was generated')
        or { 'status', args[i + 2], 'code', args[i + 3], 'body', args[i + 4] }
      if args[i + 5] ~= '' then result[#result + 1] = 'state'; result[#result + 1] = args[i + 5] end
      if args[i + 6] ~= '' then result[#result + 1] = 'policy_version'; result[#result + 1] = args[i + 6] end
      if more > 0 and args[i + 9] ~= '' then result[#result + 1] = 'error'; result[#result + 1] = args[i + 9] end
      local last = not code and more > 0 and args[i + 10] ~= '' and { 'sse', args[i + 10], 'n', args[i + 11] }
      if count > 0 then keep(P, gone, id, nil, args, i + ENDING, count) end
      held.checkpoints = held.checkpoints or count > 0 or last
      conclude(P, gone, id, held, result, last)
      if turns > 0 and not code then
        remember(P, args[after], tonumber(held.reply_ttl_ms) or 0, now, args, after + 2, turns)
      end
    end
    out[#out + 1] = mine and held.status ~= 'queued' and 1 or 0
    i = i + 9 + more
  end
  settle(P, gone)
  if #gone.leases > 0 then redis.call('HINCRBY', P, 'ends', #gone.leases) end
  return out
end

-- args: limit, (id, fence, number of segments, segments as in renew, delay_ms, message)...
-- -> `retry`, `dead` or `lost`; a repeated call answers alike
-- The caller draws the delay: randomness inside a function is the same in every call.
local function fail(keys, args)
  local P, now, out, limit, i = keys[1], now_ms(), {}, tonumber(args[1]), 2
  local gone = ends(now)
  while i <= #args do
    local id, count, held = args[i], tonumber(args[i + 2]), held_of(P, args[i])
    local delay_ms, message = args[i + 3 + count * SEGMENT], args[i + 4 + count * SEGMENT]
    if held.fence ~= args[i + 1] then
      out[#out + 1] = 'lost'
    elseif held.status ~= 'running' then
      out[#out + 1] = held.status == 'queued' and 'retry' or 'dead'
    elseif held.cancel then
      stop(P, gone, id, held)
      out[#out + 1] = 'dead'
    elseif redis.call('HINCRBY', P .. ':reply:' .. id, 'fails', 1) >= limit then
      note(held, now, 'failed')
      bury(P, id, held_of(P, id), 'failures', message)
      conclude_error(P, gone, id, held, 'failed', 'engine_failed', 'job ' .. id .. ' failed ' .. limit .. ' times; the dead letter tells why')
      out[#out + 1] = 'dead'
    else
      keep(P, gone, id, held.inbox, args, i + 3, count)
      note(held, now, 'failed')
      redis.call('HSET', P .. ':reply:' .. id, 'status', 'queued')
      redis.call('ZADD', P .. ':delayed', now + tonumber(delay_ms), id)
      gone.leases[#gone.leases + 1] = id
      out[#out + 1] = 'retry'
    end
    i = i + 5 + count * SEGMENT
  end
  settle(P, gone)
  return out
end

-- args: (id, fence, number of segments, segments as in renew)... -> 1 handed back, also if repeated; 0 the lease was lost
local function release(keys, args)
  local P, now, out, i = keys[1], now_ms(), {}, 1
  local gone = ends(now)
  while i <= #args do
    local id, count, held = args[i], tonumber(args[i + 2]), held_of(P, args[i])
    local mine = held.fence == args[i + 1]
    if mine and held.status == 'running' then
      keep(P, gone, id, held.inbox, args, i + 3, count)
      redis.call('HINCRBY', P .. ':reply:' .. id, 'handbacks', 1)
      note(held, now, 'handed back')
      requeue(P, gone, id, held_of(P, id), now)
    end
    out[#out + 1] = mine and 1 or 0
    i = i + 3 + count * SEGMENT
  end
  settle(P, gone)
  return out
end

-- args: id... -> `cancelled` (it never begins), `stopping` (its worker is told), the terminal status it has, or `unknown`
local function cancel(keys, args)
  local P, now, out, called = keys[1], now_ms(), {}, {}
  local gone = ends(now)
  for _, id in ipairs(args) do
    local held = held_of(P, id)
    if held.status == 'queued' then
      leave_waiting(P, id)
      conclude_error(P, gone, id, held, 'cancelled', 'cancelled', 'job ' .. id .. ' was cancelled before it began')
      out[#out + 1] = 'cancelled'
    elseif held.status == 'running' then
      redis.call('HSET', P .. ':reply:' .. id, 'cancel', 1)
      called[held.worker] = true
      out[#out + 1] = 'stopping'
    else
      out[#out + 1] = held.status or 'unknown'
    end
  end
  settle(P, gone)
  for worker in pairs(called) do ring(P, worker) end
  return out
end

-- args: (id, ms of its end)... -> how many; their owner has these replies
local function collect(keys, args)
  local missing = unprepared(keys[1])
  if missing then return missing end
  local marks = {}
  for i = 1, #args, 2 do marks[i], marks[i + 1] = args[i + 1], args[i] end
  redis.call('ZADD', keys[1] .. ':collected', unpack(marks))
  return #args / 2
end

local function reclaim_expired(P, gone, now, most, limit)
  local reclaimed, dead = 0, 0
  for _, id in ipairs(due(P .. ':leases', now, most)) do
    local held = held_of(P, id)
    if held.status == 'running' then redis.call('HDEL', P .. ':reply:' .. id, 'fence') end -- its late holder is told `lost`
    if held.status ~= 'running' then
      gone.leases[#gone.leases + 1] = id
    else
      local crashes = redis.call('HINCRBY', P .. ':reply:' .. id, 'crashes', 1)
      note(held, now, 'lost after ' .. kept_tokens(held) .. ' kept tokens')
      if crashes >= limit and not held.cancel then
        bury(P, id, held_of(P, id), 'crashes', 'its workers died or froze ' .. limit .. ' times in a row')
        conclude_error(P, gone, id, held, 'failed', 'worker_lost', 'job ' .. id .. ' was lost with its worker ' .. limit .. ' times in a row')
        dead = dead + 1
      else
        if crashes == limit - 1 and limit > 2 then
          redis.call('HSET', P .. ':reply:' .. id, 'alone', 1)
        end
        requeue(P, gone, id, held_of(P, id), now)
        reclaimed = reclaimed + 1
      end
    end
  end
  return reclaimed, dead
end

local function expire_late(P, gone, now, most)
  local expired = 0
  for _, id in ipairs(due(P .. ':deadlines', now, most)) do
    local held = held_of(P, id)
    if held.status == 'queued' then
      leave_waiting(P, id)
      conclude_error(P, gone, id, held, 'expired', 'deadline_exceeded', 'the deadline of job ' .. id .. ' passed before it began')
      expired = expired + 1
    elseif held.status == 'running' then -- its worker hears of it when it renews; look again later
      redis.call('ZADD', P .. ':deadlines', now + 5000, id)
    else
      gone.deadlines[#gone.deadlines + 1] = id
    end
  end
  return expired
end

-- A step that failed half-way can leave an entry read but not begun. Walks the pending lists, a portion a call.
local function find_orphans(P, gone, now, most, idle_ms)
  local found = 0
  for _, lane in ipairs(LANES) do
    local stream, from = P .. ':jobs:' .. lane, redis.call('HGET', P, 'scan:' .. lane) or '-'
    local pending = redis.call('XPENDING', stream, GROUP, 'IDLE', idle_ms, from, '+', most)
    redis.call('HSET', P, 'scan:' .. lane, #pending == most and '(' .. pending[#pending][1] or '-')
    for _, row in ipairs(pending) do
      local entry = row[1]
      local copy = redis.call('XRANGE', stream, entry, entry)[1]
      local fields = map_of(copy and copy[2] or {})
      local id = fields.id or entry
      local held = held_of(P, id)
      local live = held.status == 'queued' or held.status == 'running'
      if not copy then
        gather(gone.entries, lane, entry)
      elseif not (live and held.entry == entry and held.lane == lane) then -- new, or a copy: as take would have it
        local admitted, fresh = admit(P, gone, lane, copy, fields, now)
        if admitted then requeue(P, gone, admitted, fresh, now) end
        found = found + 1
      elseif held.status == 'queued' and not waits(P, id) then
        requeue(P, gone, id, held, now)
        found = found + 1
      elseif held.status == 'running' and not redis.call('ZSCORE', P .. ':leases', id) then
        redis.call('ZADD', P .. ':leases', now, id)
        found = found + 1
      end
    end
  end
  return found
end

local function bury_collected(P, now, most)
  for _, id in ipairs(due(P .. ':collected', now - TOMBSTONE_AFTER_MS, most)) do
    local finished = tonumber(redis.call('HGET', P .. ':reply:' .. id, 'finished_ms'))
    if finished and finished <= now - TOMBSTONE_AFTER_MS then -- else the id lives again: accepted anew, or after a failover
      redis.call('HDEL', P .. ':reply:' .. id, 'body', 'state', 'inbox', 'run', 'fence', 'entry', 'lane')
    end
    redis.call('ZREM', P .. ':collected', id)
  end
end

-- How fast jobs end, over a few seconds: what a full queue tells a client to wait follows from it.
local function measure_rate(P, now)
  local seen = redis.call('HMGET', P, 'ends', 'rate_ends', 'rate_ms')
  local ended, before, since = tonumber(seen[1]) or 0, tonumber(seen[2]) or 0, tonumber(seen[3]) or 0
  if now - since < RATE_WINDOW_MS then return end
  redis.call('HSET', P, 'rate_ends', ended, 'rate_ms', now)
  if since > 0 then redis.call('HSET', P, 'ends_per_s', math.floor(1000 * (ended - before) / (now - since))) end
end

local function forget_workers(P, now, most)
  for _, worker in ipairs(due(P .. ':workers', now - WORKER_FORGOTTEN_MS, most)) do
    local holds = 0
    for _, lane in ipairs(LANES) do
      local stream = P .. ':jobs:' .. lane
      local pending = #redis.call('XPENDING', stream, GROUP, '-', '+', 1, worker)
      if pending == 0 then redis.call('XGROUP', 'DELCONSUMER', stream, GROUP, worker) end
      holds = holds + pending
    end
    if holds == 0 then redis.call('ZREM', P .. ':workers', worker) end
  end
end

-- args: most, crash limit, reclaim (1 or 0), idle_ms of an orphan (0: do not look for any)
-- -> {reclaimed, dead, promoted, expired, orphans}
local function sweep(keys, args)
  local P, now = keys[1], now_ms()
  local gone = ends(now)
  local missing = unprepared(P)
  if missing then return missing end
  local most, reclaimed, dead, orphans = tonumber(args[1]), 0, 0, 0
  if args[3] == '1' then reclaimed, dead = reclaim_expired(P, gone, now, most, tonumber(args[2])) end
  settle(P, gone)
  gone = ends(now)
  local promoted = promote(P, 'delayed', now, now, most)
  local expired = expire_late(P, gone, now, most)
  settle(P, gone)
  if args[4] ~= '0' then
    gone = ends(now)
    orphans = find_orphans(P, gone, now, most, args[4])
    settle(P, gone)
    forget_workers(P, now, most)
  end
  bury_collected(P, now, most)
  measure_rate(P, now)
  return { reclaimed, dead, promoted, expired, orphans }
end

-- -> the library's version: an older one never replaces a newer
local function version()
  return VERSION
end

local function step(name, callback, flags)
  redis.register_function({ function_name = 'rolloutq_' .. name, callback = callback, flags = flags })
end

step('version', version, { 'no-writes', 'allow-oom' })
step('enqueue', enqueue, {})
step('take', take, { 'allow-oom' })
step('renew', renew, { 'allow-oom' })
step('finish', finish, { 'allow-oom' })
step('recall', recall, { 'no-writes', 'allow-oom' })
step('fail', fail, { 'allow-oom' })
step('release', release, { 'allow-oom' })
step('sweep', sweep, { 'allow-oom' })
step('cancel', cancel, { 'allow-oom' })
step('collect', collect, { 'allow-oom' })
