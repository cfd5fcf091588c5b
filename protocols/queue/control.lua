--
-- The control channel: what the pool shall do, who wanted it, who obeyed. It continues sweep.lua.
--
-- P:desired       gate open|closed; mode release|drain|keep|abort: what a closed gate does to jobs in flight;
--                 memory loaded|offloaded|discarded|stale; weights (policy version; empty: those that the workers started
--                 with) uri sha256; epoch generation by at_ms
--                 `gate@<worker>` `mode@<worker>` `memory@<worker>`: of one worker, until the next such order to all
-- P:commands      every command: said verb worker generation until_ms by via, or refused
-- P:acks:<id>     @said @generation @workers @until_ms, what else was answered, and a JSON object of each worker

local LIVE_MS = 10 * 1000
local COMMANDS_MOST, NEWS_MOST = 10000, 100
local ACKS_TTL_MS = 3600 * 1000
local COMMAND_S = 60
local CANCEL_MOST = 500

local function one_of(words)
  return function(value)
    for word in string.gmatch(words, '%S+') do
      if value == word then return true end
    end
  end
end

local function like(pattern, most)
  return function(value) return #value <= most and string.find(value, pattern) ~= nil end
end

local OPTIONS = { -- what an option may be, and how to tell
  worker = { like('^[%w._%-]+$', 64), "a worker's id" },
  by = { like('^[%w._@:/%-]+$', 128), 'who asks: up to 128 of A-Z a-z 0-9 . _ @ : / -' },
  id = { like('^[%w._:%-]+$', 64), 'up to 64 of A-Z a-z 0-9 . _ : -; the same id is the same command' },
  timeout_s = { like('^[1-9]%d*$', 5), 'seconds, 1 to 99999: until when it shall be obeyed' },
  mode = { one_of('release drain keep abort'), 'release, drain, keep or abort' },
  level = { one_of('1 2'), '1 (weights are kept in host memory) or 2 (weights are discarded)' },
  version = { function(value) return value == '0' or like('^[1-9]%d*$', 13)(value) end, 'a whole number' },
  uri = { like('^[^%c]+$', 4096), 'where the safetensors are: a file or a directory' },
  sha256 = { like('^%x+$', 64), '64 hexadecimal digits' },
  job = { like('^[%w._:~%-]+$', 128), "a job's id" },
  run = { like('^[^%c]+$', 256), "a run's name" },
  now = { one_of('true false'), 'true or false' },
}
local ANY = ' by id timeout_s'
local VERBS = { -- what each takes, beside ANY
  ['pause'] = 'mode worker', ['continue'] = 'worker', ['offload'] = 'level worker', ['onload'] = 'worker',
  ['update_weights'] = 'version uri sha256', ['cancel'] = 'job run', ['shutdown'] = 'now worker',
  ['health'] = 'worker', ['ready'] = 'worker', ['metadata'] = 'worker', ['status'] = 'worker', ['ping'] = 'worker',
}
local VERB_LIST = 'cancel continue health metadata offload onload pause ping ready shutdown status update_weights'

local function invalid(told)
  return nil, 'INVALID ' .. string.gsub(told, '%c', '?')
end

-- The one parser: words to {verb, said, options}, or nil and what is wrong with them.
local function parsed(words)
  local verb, given, said = words[1] or '', {}, { words[1] }
  if not VERBS[verb] then return invalid("no verb '" .. string.sub(verb, 1, 64) .. "'; one of: " .. VERB_LIST) end
  local known = VERBS[verb] .. ANY
  for i = 2, #words do
    local name, value = string.match(words[i], '^([%w_]+)=(.+)$')
    if not name then return invalid(verb .. ": '" .. string.sub(words[i], 1, 64) .. "' is no option; write name=value") end
    if not one_of(known)(name) then return invalid(verb .. ' has no option ' .. string.sub(name, 1, 64) .. '; its options: ' .. known) end
    if not OPTIONS[name][1](value) then return invalid(verb .. ' ' .. name .. ': ' .. OPTIONS[name][2]) end
    given[name] = value
    if name ~= 'id' and name ~= 'by' then said[#said + 1] = words[i] end
  end
  if verb == 'update_weights' and not given.version then return invalid('update_weights: say version=') end
  if given.sha256 and #given.sha256 ~= 64 then return invalid('update_weights sha256: ' .. OPTIONS.sha256[2]) end
  if given.sha256 and not given.uri then return invalid('update_weights sha256: it is of what uri= names; say that too') end
  if verb == 'cancel' and (given.job == nil) == (given.run == nil) then return invalid('cancel: say either job= or run=') end
  return { verb = verb, said = table.concat(said, ' '), given = given }
end

local UNSAID = { mode = 'release', memory = 'loaded', weights = '', uri = '', sha256 = '', generation = '0' }

-- What is wanted; without a gate where nobody has said it yet.
local function desired_of(P)
  local desired = map_of(redis.call('HGETALL', P .. ':desired'))
  for field, value in pairs(UNSAID) do desired[field] = desired[field] or value end
  return desired
end

local function of_worker(desired, field, worker)
  return desired[field .. '@' .. worker] or desired[field]
end

local function live_workers(P, now)
  local live = redis.call('ZRANGEBYSCORE', P .. ':workers', now - LIVE_MS, '+inf')
  table.sort(live)
  return live
end

-- Why a live worker may not take jobs again, if it may not: `NOTYET`, it is about to be ready; `REFUSED`, it is not.
local function unready(P, desired, worker)
  local told = redis.call('HMGET', P .. ':worker:' .. worker, 'state', 'memory', 'policy_version', 'generation', 'doing', 'trouble')
  if one_of('starting draining stopped')(told[1]) then return end -- it takes nothing, or nothing before it is where it shall be
  local lagging = told[4] and tonumber(told[4]) and tonumber(told[4]) < tonumber(desired.generation)
  local version = desired.weights ~= '' and told[3] ~= desired.weights
  if told[2] == 'loaded' and not version then return end
  local name = 'continue: worker ' .. worker .. ' '
  if (told[5] or '') ~= '' then return 'NOTYET ' .. name .. 'is at ' .. told[5] .. '; repeat in a moment' end
  if lagging then return 'NOTYET ' .. name .. 'has not heard the last order yet; repeat in a moment' end
  local trouble = (told[6] or '') ~= '' and ' (' .. told[6] .. ')' or ''
  if told[2] == 'stale' then return 'REFUSED ' .. name .. 'is stale: it has no weights' .. trouble .. '; first update_weights version= uri=' end
  if told[2] ~= 'loaded' then return 'REFUSED ' .. name .. 'is offloaded' .. trouble .. '; first onload' end
  return 'REFUSED ' .. name .. 'holds version ' .. (told[3] or '?') .. ', not ' .. desired.weights .. trouble
    .. '; first update_weights with weights that it can load'
end

-- What is legal when. Each gives the changes of the desired state, or nil and why it is refused.
local ORDERS = {}

ORDERS['pause'] = function(_, _, given)
  return { gate = 'closed', mode = given.mode or 'release' }
end

ORDERS['continue'] = function(P, desired, _, workers)
  for _, worker in ipairs(workers) do
    local memory = of_worker(desired, 'memory', worker)
    if memory == 'stale' then return nil, 'REFUSED continue: the weights were discarded; first update_weights version= uri=' end
    if memory ~= 'loaded' then return nil, 'REFUSED continue: the weights are ' .. memory .. '; first onload' end
  end
  if #workers == 0 and desired.memory ~= 'loaded' then
    return nil, 'REFUSED continue: the weights are ' .. desired.memory .. '; first ' .. (desired.memory == 'stale' and 'update_weights' or 'onload')
  end
  for _, worker in ipairs(workers) do
    local told = unready(P, desired, worker)
    if told then return nil, told end
  end
  return { gate = 'open', mode = desired.mode }
end

ORDERS['offload'] = function(_, desired, given, workers)
  local wanted = given.level == '2' and 'discarded' or 'offloaded'
  for _, worker in ipairs(workers) do
    if of_worker(desired, 'gate', worker) ~= 'closed' then return nil, 'REFUSED offload: worker ' .. worker .. ' is serving; first pause' end
    local memory = of_worker(desired, 'memory', worker)
    if wanted == 'offloaded' and (memory == 'discarded' or memory == 'stale') then
      return nil, 'REFUSED offload level=1: the weights of worker ' .. worker .. ' are discarded already; offload level=2, or update_weights'
    end
  end
  if desired.gate ~= 'closed' and not given.worker then return nil, 'REFUSED offload: the pool is serving; first pause' end
  return { memory = wanted }
end

ORDERS['onload'] = function(_, desired, given, _)
  local memory = given.worker and of_worker(desired, 'memory', given.worker) or desired.memory
  return { memory = (memory == 'discarded' or memory == 'stale') and 'stale' or 'loaded' }
end

ORDERS['update_weights'] = function(P, desired, given, workers)
  for _, worker in ipairs(workers) do
    local memory = of_worker(desired, 'memory', worker)
    if memory == 'offloaded' or memory == 'discarded' then return nil, 'REFUSED update_weights: the weights of worker ' .. worker .. ' are ' .. memory .. '; first onload' end
    local same = given.version == desired.weights and (given.uri or '') == desired.uri and (given.sha256 or '') == desired.sha256
    local told = redis.call('HMGET', P .. ':worker:' .. worker, 'policy_version', 'memory')
    if given.version == desired.weights and told[1] == given.version and told[2] == 'loaded' and not same then
      return nil, 'REFUSED update_weights: version ' .. given.version .. ' is in use with other weights; give these a new version'
    end
  end
  return { memory = 'loaded', weights = given.version, uri = given.uri or '', sha256 = given.sha256 or '' }
end

local FOR_ONE = { gate = true, mode = true, memory = true }

-- Write the changes, for all workers or for one; those for all end what was for one. -> generation
local function want(P, desired, changes, worker, by, now)
  local key, flat = P .. ':desired', { 'by', by, 'at_ms', now }
  for field, value in pairs(changes) do
    flat[#flat + 1] = worker and FOR_ONE[field] and field .. '@' .. worker or field
    flat[#flat + 1] = value
  end
  redis.call('HSET', key, unpack(flat))
  for field in pairs(desired) do
    local base = string.match(field, '^(%w+)@')
    if not worker and base and changes[base] then redis.call('HDEL', key, field) end
  end
  return redis.call('HINCRBY', key, 'generation', 1)
end

-- Cancel a job, or some of a run; whoever asks repeats it while any are left. -> what to answer
local function cancel_some(P, given)
  local counts, ids, left = { cancelled = 0, stopping = 0, ended = 0, unknown = 0 }, { given.job }, 0
  if given.run then
    local all = redis.call('ZRANGE', P .. ':run:' .. given.run, 0, -1)
    ids = {}
    for _, id in ipairs(all) do
      local held = redis.call('HMGET', P .. ':reply:' .. id, 'status', 'cancel')
      local open = held[1] == 'queued' or (held[1] == 'running' and not held[2])
      if open and #ids < CANCEL_MOST then ids[#ids + 1] = id elseif open then left = left + 1 end
    end
  end
  for _, told in ipairs(cancel({ P }, ids)) do
    local name = counts[told] and told or 'ended'
    counts[name] = counts[name] + 1
  end
  return { 'cancelled', counts.cancelled, 'stopping', counts.stopping, 'ended', counts.ended, 'unknown', counts.unknown, 'left', left }
end

local function answer_of(P, id, acks)
  local answer = { 'command', id, 'said', acks['@said'], 'generation', tostring(acks['@generation']), 'workers', acks['@workers'] }
  for _, name in ipairs({ 'cancelled', 'stopping', 'ended', 'unknown', 'left' }) do
    if acks['@' .. name] then answer[#answer + 1] = name; answer[#answer + 1] = tostring(acks['@' .. name]) end
  end
  if acks['@workers'] ~= '' then answer[#answer + 1] = 'answers'; answer[#answer + 1] = 'HGETALL ' .. P .. ':acks:' .. id end
  return answer
end

-- What was published on the channel reaches every worker, and each brings it here: the first is the command. The others'
-- is the first of the same words after the one that they brought last.
local function heard_before(P, message, after)
  local entries = redis.call('XRANGE', P .. ':commands', '(' .. after, '+', 'COUNT', COMMANDS_MOST)
  for _, entry in ipairs(entries) do
    local fields = map_of(entry[2])
    if fields.heard == message then return entry[1], fields end
  end
end

local function log_command(P, id, fields)
  local entry = redis.call('XADD', P .. ':commands', 'MAXLEN', '~', COMMANDS_MOST, '*', unpack(fields))
  return id or entry, entry
end

-- What was said, whatever it is, and who said it.
local function said_by(words, heard)
  local said, by = {}, heard and 'channel' or '?'
  for _, word in ipairs(words) do
    local signed = string.match(word, '^by=(.+)$')
    if signed and OPTIONS.by[1](signed) then by = signed
    elseif not string.find(word, '^id=') then said[#said + 1] = word end
  end
  return string.sub(table.concat(said, ' '), 1, 1024), by
end

-- Who waits for a worker to be ready asks again and again: the same refusal in a row is noted once.
local function noted_last(P, said, told, by)
  local newest = redis.call('XREVRANGE', P .. ':commands', '+', '-', 'COUNT', 1)[1]
  local last = newest and map_of(newest[2]) or {}
  return last.said == said and last.refused == told and last.by == by
end

local function refuse(P, words, told, heard)
  local said, by = said_by(words, heard)
  if not heard and noted_last(P, said, told, by) then return redis.error_reply(told) end
  local fields = { 'said', said, 'refused', told, 'by', by }
  if heard then fields[#fields + 1] = 'heard'; fields[#fields + 1] = heard end
  log_command(P, nil, fields)
  return redis.error_reply(told)
end

-- The one way in, whatever form a command came in. -> as answer_of
local function command(P, words, heard)
  local now = now_ms()
  local asked, told = parsed(words)
  if not asked then return refuse(P, words, told, heard) end
  local given, by = asked.given, asked.given.by or (heard and 'channel' or '?')
  if given.id then
    local before = map_of(redis.call('HGETALL', P .. ':acks:' .. given.id))
    if before['@said'] then return answer_of(P, given.id, before) end
  end
  local desired, live = desired_of(P), live_workers(P, now)
  local workers = live
  if asked.verb == 'cancel' then workers = {} end
  if given.worker then
    workers = { given.worker }
    if not one_of(table.concat(live, ' '))(given.worker) then
      return refuse(P, words, 'REFUSED ' .. asked.verb .. ': no live worker ' .. given.worker .. '; live are: ' .. table.concat(live, ' '), heard)
    end
  end
  local changes, generation, extra
  if ORDERS[asked.verb] then
    if not desired.gate then return refuse(P, words, 'NOTYET ' .. asked.verb .. ': the pool has no desired state yet; start a worker, and repeat', heard) end
    changes, told = ORDERS[asked.verb](P, desired, given, workers)
    if not changes then return refuse(P, words, told, heard) end
    generation = want(P, desired, changes, given.worker, by, now)
  elseif asked.verb == 'cancel' then
    extra = cancel_some(P, given)
  end
  local until_ms = now + 1000 * (tonumber(given.timeout_s) or COMMAND_S)
  local fields = { 'said', asked.said, 'verb', asked.verb, 'until_ms', until_ms, 'by', by }
  for name, value in pairs({ worker = given.worker, generation = generation, id = given.id, heard = heard }) do
    fields[#fields + 1] = name; fields[#fields + 1] = value
  end
  local id, entry = log_command(P, given.id, fields)
  local acks = { ['@said'] = asked.said, ['@generation'] = generation or '', ['@workers'] = table.concat(workers, ' '), ['@until_ms'] = until_ms, ['@entry'] = entry }
  for i = 1, #(extra or {}), 2 do acks['@' .. extra[i]] = extra[i + 1] end
  local flat = {}
  for name, value in pairs(acks) do flat[#flat + 1] = name; flat[#flat + 1] = value end
  redis.call('HSET', P .. ':acks:' .. id, unpack(flat))
  redis.call('PEXPIRE', P .. ':acks:' .. id, ACKS_TTL_MS)
  if #workers > 0 then ring(P, given.worker or 'all') end
  return answer_of(P, id, acks)
end

-- args: verb, name=value...; see VERBS. -> {field, value, ...}: command, said, generation, workers, answers
local function control(keys, args)
  local missing = unprepared(keys[1])
  if missing then return missing end
  return command(keys[1], args)
end

-- args: the message as it was published, the command that this worker brought last, verb, name=value...
-- -> the entry of the command that it became
local function hear(keys, args)
  local P = keys[1]
  local missing = unprepared(P)
  if missing then return missing end
  local before = heard_before(P, args[1], args[2])
  if before then return before end
  command(P, { unpack(args, 3) }, args[1])
  return redis.call('XREVRANGE', P .. ':commands', '+', '-', 'COUNT', 1)[1][1]
end

-- A desired state that a worker knows is newer than the server's: that is lost, made anew, or an older copy's.
local function newer(known, there)
  if not there.gate then return true end
  if known.epoch == there.epoch then return tonumber(known.generation) > tonumber(there.generation or 0) end
  return there.by == 'default' and there.generation == '0' and known.generation ~= '0'
end

-- args: worker, ttl_ms, the last command it has seen (`$`: none, begin with the next), number of desired values, field,
--       value, ..., number of answers' values, command, JSON, ..., worker field, value, ...
-- Writes the desired state back where the server has none, or an older one. A worker that beats hears every command after it.
-- -> {server ms, {desired field, value, ...}, last command seen, {{command, {field, value, ...}}...}}
local function beat(keys, args)
  local P, now, worker, cursor, count = keys[1], now_ms(), args[1], args[3], tonumber(args[4])
  local missing = unprepared(P)
  if missing then return missing end
  local known = { unpack(args, 5, 4 + count) }
  if count > 0 and newer(map_of(known), map_of(redis.call('HGETALL', P .. ':desired'))) then
    redis.call('DEL', P .. ':desired')
    redis.call('HSET', P .. ':desired', unpack(known))
  end
  local from = 5 + count
  local last = from + tonumber(args[from])
  for i = from + 1, last, 2 do
    redis.call('HSET', P .. ':acks:' .. args[i], worker, args[i + 1])
    redis.call('PEXPIRE', P .. ':acks:' .. args[i], ACKS_TTL_MS)
  end
  redis.call('ZADD', P .. ':workers', now, worker)
  redis.call('HSET', P .. ':worker:' .. worker, 'beat_ms', now, unpack(args, last + 1))
  redis.call('PEXPIRE', P .. ':worker:' .. worker, args[2])
  local news = {}
  if cursor == '$' then
    local newest = redis.call('XREVRANGE', P .. ':commands', '+', '-', 'COUNT', 1)[1]
    cursor = newest and newest[1] or '0-0'
  else
    for _, entry in ipairs(redis.call('XRANGE', P .. ':commands', '(' .. cursor, '+', 'COUNT', NEWS_MOST)) do
      news[#news + 1], cursor = { map_of(entry[2]).id or entry[1], entry[2] }, entry[1]
    end
  end
  return { now, redis.call('HGETALL', P .. ':desired'), cursor, news }
end

step('control', control, { 'allow-oom' })
step('hear', hear, { 'allow-oom' })
step('beat', beat, { 'allow-oom' })
