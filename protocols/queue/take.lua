--
-- How a job comes in, and how a worker takes it. It continues functions.lua.

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

-- Several clients may have submitted one job: the newest `LISTENERS` are woken at its end.
local function listeners(inboxes, inbox)
  local names = { inbox }
  for name in string.gmatch(inboxes or '', '%S+') do
    if name ~= inbox then table.insert(names, #names, name) end
  end
  return table.concat(names, ' ', math.max(1, #names - LISTENERS + 1))
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
    local known = redis.call('HMGET', key, 'status', 'sha', 'inbox')
    if not well_formed(id) or lane == 'resume' or not LANE[lane] then
      out[#out + 1] = 'invalid'
    elseif known[1] and known[2] ~= sha then
      out[#out + 1] = 'conflict'
    elseif known[1] then
      local fields = map_of(args, i + 4, i + 3 + count)
      if fields.inbox and (known[1] == 'queued' or known[1] == 'running') then
        redis.call('HSET', key, 'inbox', listeners(known[3], fields.inbox))
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
local function admit(P, gone, lane, read)
  local entry, flat = read[1], read[2]
  local id = value_of(flat, 'id') or entry
  local held = held_of(P, id)
  if held.status == 'queued' and held.lane == lane and held.entry == entry then return id, held end
  local fields = map_of(flat)
  if not well_formed(id) then
    bear(P, entry, lane, entry, fields, '', gone.at)
    conclude_error(P, gone, entry, held_of(P, entry), 'failed', 'invalid_request', '`id`: 1 to 128 of A-Z a-z 0-9 . _ : ~ -')
    return
  end
  if not held.status then
    local born = string.match(entry, '^%d+')
    bear(P, id, lane, entry, fields, redis.sha1hex((fields.protocol or 'openai.chat') .. '\0' .. (fields.body or '')), born)
    held = held_of(P, id)
    if #flat <= 2 * FIELDS_MOST then return id, held end
    conclude_error(P, gone, id, held, 'failed', 'invalid_request', 'a stream entry has at most ' .. FIELDS_MOST .. ' fields')
    return
  end
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
  local turn, rounds = tonumber(redis.call('HGET', P, 'turn')) or 0, math.floor(slots / #TURNS)
  local share = { high = 0, normal = 0, low = 0 }
  for _, lane in ipairs(TURNS) do share[lane] = share[lane] + rounds end
  for k = 1, slots % #TURNS do
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

-- Whether a job waits to go on that was begun or put off before.
local function some_go_on(P, version)
  if redis.call('XLEN', P .. ':jobs:resume') > redis.call('XPENDING', P .. ':jobs:resume', GROUP)[1] then return true end
  return redis.call('ZCARD', P .. ':alone') + redis.call('ZCOUNT', P .. ':parked', '-inf', version) > 0
end

-- args: worker, nonce, slots, lease_ms, policy version, jobs that the worker holds, 1 if the call waited for the bell
-- -> {gate, {{entry, id, fence, lane, ms to its deadline, {field, value, ...}, {checkpoint entries}}...}, hold}
-- Reading and beginning are one step. hold is 1 where the worker shall take nothing else until it holds no job.
-- A worker that waited may be frozen by now, so it is given new jobs only: else frozen workers, one after the other, would
-- make a dead letter of an innocent job. Where others wait to go on, which come first, it is given none and told, as a
-- fourth value, 1: it shall ask without a wait.
-- A worker that has not waited for the answer asks again with 0 slots: it hears what was begun, and if that call comes
-- later, it begins nothing.
local function take(keys, args)
  local P, worker, nonce, slots, version, waited = keys[1], args[1], args[2], tonumber(args[3]), tonumber(args[5]), args[7] == '1'
  local missing = unprepared(P)
  if missing then return missing end
  local gates = redis.call('HMGET', P .. ':desired', 'gate', 'gate@' .. worker)
  local gate = gates[2] or gates[1] or 'missing'
  if gate ~= 'open' and slots > 0 then return { gate, {}, 0 } end
  local now = now_ms()
  local before = taken_before(P, worker, nonce, now)
  if before then return { gate, before, redis.call('HGET', P .. ':worker:' .. worker, 'take_hold') == '1' and 1 or 0 } end
  if slots == 0 then
    redis.call('HSET', P .. ':worker:' .. worker, 'take_nonce', nonce, 'take_ids', '', 'take_hold', 0)
    return { gate, {}, 0 }
  end
  if waited and some_go_on(P, version) then return { gate, {}, 0, 1 } end

  local jobs, leases, ids = {}, {}, {}
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
    local id, held = admit(P, gone, lane, read[2])
    local code, min_version = id and late(P, held, now), whole(value_of(flat, 'min_version'), 0) or 0
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

step('enqueue', enqueue, {})
step('take', take, { 'allow-oom' })
