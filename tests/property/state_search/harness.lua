
-- Appended to the library under test: puts the server into a state, takes a step and looks at the outcome.
-- An image has for each key {seconds until it expires or 0, DUMP}; a view is a list of {key, seconds, content}.

-- A take that dies before it has written its leases; nobody hears of what it began.
local function half_take(keys, args)
  for _, row in ipairs(take(keys, args)[2]) do redis.call('ZREM', keys[1] .. ':leases', row[2]) end
  redis.call('DEL', keys[1] .. ':worker:' .. args[1])
  return {}
end

local STEPS = { enqueue = enqueue, take = take, renew = renew, finish = finish, fail = fail, release = release, cancel = cancel,
  collect = collect, sweep = sweep, half_take = half_take }
local CLOCK = 'clock'
local UNUSED = { [CLOCK] = true, ['rollout:{search}:jobs:high'] = true, ['rollout:{search}:jobs:low'] = true }

-- Every key that a step may change: no job is ever in the other lanes, so they stay as they are.
local function pool_keys()
  local keys = {}
  for _, key in ipairs(redis.call('KEYS', '*')) do
    if not UNUSED[key] then keys[#keys + 1] = key end
  end
  return keys
end

local function seconds_left(key)
  return math.max(0, math.ceil(redis.call('PTTL', key) / 1000))
end

local function image_now()
  local image = {}
  for _, key in ipairs(pool_keys()) do image[key] = { seconds_left(key), redis.call('DUMP', key) } end
  return image
end

-- -> what is in `now` and not in `before`, or otherwise; the keys that are only in `before`
local function changes(before, now)
  local changed, gone = {}, {}
  for key in pairs(before) do
    if not now[key] then gone[#gone + 1] = key end
  end
  for key, kept in pairs(now) do
    local was = before[key]
    if not was or was[2] ~= kept[2] or was[1] ~= kept[1] then changed[key] = kept end
  end
  return changed, gone
end

-- Only what differs: `now` is the image of what is there.
local function restore(now, image)
  local changed, gone = changes(now, image)
  if #gone > 0 then redis.call('DEL', unpack(gone)) end
  for key, kept in pairs(changed) do redis.call('RESTORE', key, kept[1] * 1000, kept[2], 'REPLACE') end
end

local function stream_of(key)
  if not string.find(key, ':jobs:') then return { redis.call('XRANGE', key, '-', '+') } end
  local read, pending = '', {}
  for _, group in ipairs(redis.call('XINFO', 'GROUPS', key)) do
    local named = map_of(group)
    if named.name == GROUP then read = named['last-delivered-id'] end
  end
  for _, row in ipairs(redis.call('XPENDING', key, GROUP, '-', '+', 100)) do pending[#pending + 1] = row[1] end
  return { redis.call('XRANGE', key, '-', '+'), read, pending }
end

local READ = {
  hash = function(key) return redis.call('HGETALL', key) end,
  zset = function(key) return redis.call('ZRANGE', key, 0, -1, 'WITHSCORES') end,
  list = function(key) return redis.call('LRANGE', key, 0, -1) end,
  stream = stream_of,
}

local function view_of(image)
  local view = {}
  for key, kept in pairs(image) do view[#view + 1] = { key, kept[1], READ[redis.call('TYPE', key).ok](key) } end
  return view
end

local function act(P, operation)
  local name = table.remove(operation, 1)
  if STEPS[name] then return STEPS[name]({ P }, operation) end
  return redis.call(name, unpack(operation))
end

-- Operations in args from `at`: how many, and for each how many words, words... -> the list, what comes after it
local function operations_at(args, at)
  local operations, after = {}, at + 1
  for i = 1, tonumber(args[at]) do
    local words = tonumber(args[after])
    operations[i] = { unpack(args, after + 1, after + words) }
    after = after + 1 + words
  end
  return operations, after
end

local function act_all(P, clock, operations)
  redis.call('SET', CLOCK, clock)
  local answers = {}
  for i, operation in ipairs(operations) do
    local well, answer = pcall(act, P, operation)
    if not well then answer = { err = type(answer) == 'table' and answer.err or tostring(answer) } end
    answers[i] = answer
  end
  return answers
end

-- args: image, then for each outcome asked for: clock, operations
-- -> for each {answers}; where the operations changed anything also the image, a view of the keys changed, the keys gone
local function search(keys, args)
  local image, out, i, operations = cmsgpack.unpack(args[1]), {}, 2, nil
  local now = image_now()
  while i <= #args do
    local clock = args[i]
    operations, i = operations_at(args, i + 1)
    restore(now, image)
    local answers = act_all(keys[1], clock, operations)
    now = image_now()
    local changed, gone = changes(image, now)
    local quiet = #gone == 0 and not next(changed)
    out[#out + 1] = quiet and { answers } or { answers, cmsgpack.pack(now), view_of(changed), gone }
  end
  return out
end

local function quiet(P)
  return redis.call('XLEN', P .. ':jobs:normal') + redis.call('XLEN', P .. ':jobs:resume') == 0
end

-- args: image, clock, rounds, ms of a round, crash limit, operations
-- -> the view after time has passed while one live worker sweeps, takes and finishes
local function rescue(keys, args)
  local P, now = keys[1], tonumber(args[2])
  restore(image_now(), cmsgpack.unpack(args[1]))
  act_all(P, args[2], (operations_at(args, 6)))
  for round = 1, tonumber(args[3]) do
    now = now + tonumber(args[4])
    redis.call('SET', CLOCK, now)
    sweep({ P }, { '100', args[5], '1', '-1' })
    if quiet(P) then break end
    for _, row in ipairs(take({ P }, { 'rescuer', 'rescue.' .. round, '9', '15000', '9', '0' })[2]) do
      finish({ P }, { row[2], row[3], 'completed', '200', 'rescued', '', '', '', '0' })
    end
    if quiet(P) then break end
  end
  return view_of(image_now())
end

step('search', search, {})
step('rescue', rescue, {})
