#!/usr/bin/env bash
# The whole contract from a shell. The worker describes itself (server reflection), so no proto file is needed.
# grpcurl is at https://github.com/fullstorydev/grpcurl; `make setup` puts one into .venv/bin.
set -euo pipefail
target="${TOKENWIRE_TARGET:-127.0.0.1:50051}"

call() { # METHOD JSON
  grpcurl -plaintext -d "$2" "$target" "$1"
}

echo '--- Is it ready?'
call grpc.health.v1.Health/Check '{"service": "readiness"}'
call tokenwire.v1.Inference/Health '{}'

echo '--- A stream: started, token…, metrics, end'
call tokenwire.v1.Inference/Execute \
  '{"job_id": "shell-1", "prompt": "The capital of France is", "max_tokens": 4, "temperature": 0}'

echo '--- A job that outlives its call: this one is cut off by its deadline …'
token="$(head -c 24 /dev/urandom | base64 | tr '+/' '-_')"
grpcurl -plaintext -max-time 1 -d '{"job_id": "shell-2", "prompt": "Once upon a time", "max_tokens": 300,
  "seed": 1, "detach": true, "attach_token": "'"$token"'"}' "$target" tokenwire.v1.Inference/Execute \
  >/dev/null || echo 'the call is over, the job is not'

echo '--- … and is taken up again from token 250 on'
call tokenwire.v1.Inference/Attach '{"job_id": "shell-2", "from_index": 250, "attach_token": "'"$token"'"}'

echo '--- Cancel is idempotent'
call tokenwire.v1.Inference/Cancel '{"job_id": "shell-2"}'

echo '--- A refusal names every field'
grpcurl -plaintext -d '{"job_id": "no spaces", "prompt": "x", "temperature": 9}' \
  "$target" tokenwire.v1.Inference/Execute || echo 'refused, as it should be'
