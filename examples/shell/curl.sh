#!/usr/bin/env bash
# HTTP and server-sent events with nothing but curl. Needs a worker with `--http-port`, or `tokenwire gateway`.
set -euo pipefail
url="${TOKENWIRE_URL:-http://127.0.0.1:8080}"

post() { # PATH JSON; -N shows each event as it comes
  curl -sSN --fail-with-body -H 'content-type: application/json' -d "$2" "$url$1"
}

echo '--- Is it ready?'
curl -sS --fail-with-body "$url/health"
echo

echo '--- A stream: event: started, token…, metrics, end'
post /execute '{"job_id": "curl-1", "prompt": "The capital of France is", "max_tokens": 4, "temperature": 0}'

echo '--- A job that outlives its connection, which is closed after 1 s …'
token="$(head -c 24 /dev/urandom | base64 | tr '+/' '-_')"
curl -sSN --max-time 1 -H 'content-type: application/json' "$url/execute" -o /dev/null -d '{"job_id": "curl-2",
  "prompt": "Once upon a time", "max_tokens": 300, "seed": 1, "detach": true, "attach_token": "'"$token"'"}' \
  2>/dev/null || echo 'the connection is closed, the job is not'

echo '--- … and is taken up again; the id of the last event received would do in Last-Event-ID, too'
curl -sSN --fail-with-body -H "x-attach-token: $token" "$url/execute/curl-2?from=290"

echo '--- Cancel is idempotent'
post /cancel '{"job_id": "curl-2"}'
echo

echo '--- The shape of OpenAI'
models="$(curl -sS --fail-with-body "$url/v1/models")"
model="$(sed -E 's/.*"id": ?"([^"]+)".*/\1/' <<<"$models")"
post /v1/chat/completions '{"model": "'"$model"'", "max_tokens": 30, "temperature": 0, "stream": true,
  "messages": [{"role": "user", "content": "What is the capital of France?"}]}'

echo '--- A refusal names every field'
post /execute '{"job_id": "no spaces", "prompt": "x", "temperature": 9}' || echo 'refused, as it should be'
