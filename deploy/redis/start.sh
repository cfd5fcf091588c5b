#!/bin/sh
# Redis with the users of users.acl, their passwords from the environment: sh start.sh [more options of redis-server].
# Every pool of POOLS beside `default` gets the same users once more, named <pool>-worker, <pool>-trainer, …
set -eu

acl=$(mktemp)
trap 'rm -f "$acl"' EXIT
here=$(dirname "$0")

hashed() {
  if [ -z "$1" ]; then
    echo 'start.sh: a password is empty: set those of .env' >&2
    exit 2
  fi
  printf %s "$1" | sha256sum | cut -d ' ' -f 1
}

trainer=$(hashed "$TRAINER_PASSWORD")
worker=$(hashed "$WORKER_PASSWORD")
operator=$(hashed "$OPERATOR_PASSWORD")
viewer=$(hashed "$VIEWER_PASSWORD")
admin=$(hashed "$ADMIN_PASSWORD")

{
  sed -e "s/TRAINER-SHA256/$trainer/; s/WORKER-SHA256/$worker/" \
    -e "s/OPERATOR-SHA256/$operator/; s/VIEWER-SHA256/$viewer/" "$here/users.acl"
  echo "user admin on #$admin ~* &* +@all"
} > "$acl"

for pool in ${POOLS:-}; do
  if [ "$pool" != default ]; then
    sed -n "/^user \(trainer\|worker\|operator\|viewer\) /{s/^user /user $pool-/; s/{default}/{$pool}/g; s/:default/:$pool/g; p}" \
      "$acl" >> "$acl.$pool"
    cat "$acl.$pool" >> "$acl"
    rm "$acl.$pool"
  fi
done

# the server reads the file once, and again at ACL LOAD: it stays, readable by its user alone
trap - EXIT
exec redis-server --port "${REDIS_PORT:-6379}" --aclfile "$acl" --save '' --appendonly yes --appendfsync everysec \
  --maxmemory-policy noeviction "$@"
