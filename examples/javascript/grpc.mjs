// Streams a completion over gRPC, and takes the stream up again if it breaks: node grpc.mjs "Once upon a time"
import { createHash, randomBytes, randomUUID } from 'node:crypto';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import grpc from '@grpc/grpc-js';
import loader from '@grpc/proto-loader';

const PROTO = fileURLToPath(new URL('../../protos/tokenwire/v1/inference.proto', import.meta.url));
const TARGET = process.env.TOKENWIRE_TARGET ?? '127.0.0.1:50051';
const MAX_RESUMES = 10;

const definition = loader.loadSync(PROTO, {
  keepCase: true,
  longs: String, // a seed has 64 bits, and a JavaScript number holds 53
  enums: String,
  oneofs: true,
  includeDirs: [fileURLToPath(new URL('../../protos', import.meta.url))],
});
const { Inference } = grpc.loadPackageDefinition(definition).tokenwire.v1;
const client = new Inference(TARGET, grpc.credentials.createInsecure());

// Yields the events of one job, with no event lost or repeated, whatever happens to the connection.
async function* generate(prompt, parameters) {
  const job_id = randomUUID();
  const attach_token = randomBytes(24).toString('base64url');
  const deadline = new Date(Date.now() + 120_000);
  const digest = createHash('sha256');
  let next = 0;
  let started = false;
  let ended = false;
  let call = client.Execute({ job_id, prompt, ...parameters, detach: true, attach_token }, { deadline });
  try {
    for (let resumes = 0; ; resumes++) {
      try {
        for await (const event of call) {
          if (event.event === 'started') {
            if (started) continue;
            started = true;
          } else if (event.event === 'token') {
            for (const id of event.token.ids) {
              const bytes = Buffer.alloc(4);
              bytes.writeUInt32LE(id);
              digest.update(bytes);
            }
            next = event.token.i + event.token.ids.length;
            if (!digest.copy().digest('hex').startsWith(event.token.digest)) throw new Error('the stream has changed');
          }
          ended = event.event === 'end';
          yield event;
          if (ended) return;
        }
      } catch (error) {
        // UNAVAILABLE: the connection broke. What the worker refuses has another code, and is final.
        if (error.code !== grpc.status.UNAVAILABLE || resumes === MAX_RESUMES) throw error;
        await sleep(Math.random() * Math.min(5000, 100 * 2 ** resumes));
      }
      call = client.Attach({ job_id, from_index: next, attach_token }, { deadline });
    }
  } finally {
    if (!ended) client.Cancel({ job_id }, () => {}); // else the job would run on for its grace time
  }
}

try {
  const prompt = process.argv[2] ?? 'Once upon a time';
  for await (const event of generate(prompt, { max_tokens: 40, temperature: 0.7, seed: '7' })) {
    if (event.event === 'token') process.stdout.write(event.token.t);
    if (event.event === 'metrics') console.log(`\n[${event.metrics.tokens_per_second.toFixed(0)} tokens/s]`);
    if (event.event === 'end') console.log(`[${event.end.tokens_out} tokens, ${event.end.stop_reason}]`);
  }
} catch (error) {
  console.error(`${grpc.status[error.code] ?? 'error'}: ${error.details ?? error.message}`);
  process.exitCode = 1;
} finally {
  client.close();
}
