--
-- What falls due by itself, and what nobody else would tidy. It continues lease.lua.

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
      local id = copy and value_of(copy[2], 'id') or entry
      local held = held_of(P, id)
      local live = held.status == 'queued' or held.status == 'running'
      if not copy then
        gather(gone.entries, lane, entry)
      elseif not (live and held.entry == entry and held.lane == lane) then -- new, or a copy: as take would have it
        local admitted, fresh = admit(P, gone, lane, copy)
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

step('sweep', sweep, { 'allow-oom' })
