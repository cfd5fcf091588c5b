--
-- What the holder of a lease may do, who wants a job ended, and who has its reply. It continues take.lua.

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

-- Which turn a job's prompt goes on from is decided anew by each attempt, until one has left tokens behind that prompt.
-- args: id, fence, session, marks of the beginnings of a conversation, the longest first
-- -> {turns and bytes of the session, {rollout id, node without its log-probabilities, ...} from the longest beginning
--   that it knows back to its root, 1 if the turn that was decided on is gone}
local function recall(keys, args)
  local reply, key, path = keys[1] .. ':reply:' .. args[1], keys[1] .. ':session:' .. args[3], {}
  local size = redis.call('HMGET', key, 'turns', 'bytes')
  local held = redis.call('HMGET', reply, 'fence', 'checkpoints', 'goes_on')
  local id = held[2] and held[3]
  if not id then
    local marks = {}
    for i = 4, #args do marks[#marks + 1] = 'h:' .. args[i] end
    for _, known in ipairs(#marks > 0 and redis.call('HMGET', key, unpack(marks)) or {}) do id = id or known end
    if held[1] == args[2] then redis.call('HSET', reply, 'goes_on', id or '') end
  end
  while id and id ~= '' do
    local found = redis.call('HMGET', key, 'n:' .. id, 'l:' .. id)
    if not found[1] then return { 0, 0, {}, 1 } end
    path[#path + 1] = id
    local length, from = string.match(found[1], '^(%d+):()')
    if not length then return { 0, 0, {}, 1 } end
    path[#path + 1] = string.sub(found[1], 1, from + length - 1)
    id = string.match(found[2], '^%d+ %d+ (.*)$')
  end
  return { tonumber(size[1]) or 0, tonumber(size[2]) or 0, path, 0 }
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

-- args: (id, ms of its end)..., at most some thousand words -> how many; their owner has these replies
local function collect(keys, args)
  local missing = unprepared(keys[1])
  if missing then return missing end
  local marks = {}
  for i = 1, #args, 2 do marks[i], marks[i + 1] = args[i + 1], args[i] end
  redis.call('ZADD', keys[1] .. ':collected', unpack(marks))
  return #args / 2
end

step('renew', renew, { 'allow-oom' })
step('finish', finish, { 'allow-oom' })
step('recall', recall, { 'allow-oom' })
step('fail', fail, { 'allow-oom' })
step('release', release, { 'allow-oom' })
step('cancel', cancel, { 'allow-oom' })
step('collect', collect, { 'allow-oom' })
