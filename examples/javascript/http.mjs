// Streams a completion over HTTP with fetch alone, and takes the stream up again if it breaks:
// node http.mjs "Once upon a time"
import { randomBytes, randomUUID } from 'node:crypto';
import { setTimeout as sleep } from 'node:timers/promises';

const URL_BASE = process.env.TOKENWIRE_URL ?? 'http://127.0.0.1:8080';
const MAX_RESUMES = 10;

// Yields the server-sent events of a response: { event, id, data }.
async function* events(response) {
  let buffer = '';
  for await (const text of response.body.pipeThrough(new TextDecoderStream())) {
    buffer += text;
    for (let end; (end = buffer.indexOf('\n\n')) >= 0; buffer = buffer.slice(end + 2)) {
      const fields = {};
      for (const line of buffer.slice(0, end).split('\n')) {
        const [, name, value] = line.match(/^([^:]*):? ?(.*)$/);
        if (name) fields[name] = value; // a line that begins with a colon is a heartbeat
      }
      if (fields.data) yield { ...fields, data: JSON.parse(fields.data) };
    }
  }
}

// Yields the events of one job, with no event lost or repeated, whatever happens to the connection.
async function* generate(prompt, parameters) {
  const job_id = randomUUID();
  const attach_token = randomBytes(24).toString('base64url');
  let lastId = '0';
  let started = false;
  let open = () =>
    fetch(`${URL_BASE}/execute`, {
      method: 'POST',
      headers: { 'content-type': 'application/json' },
      body: JSON.stringify({ job_id, prompt, ...parameters, detach: true, attach_token }),
    });
  for (let resumes = 0; ; resumes++) {
    try {
      const response = await open();
      if (!response.ok) {
        const { error } = await response.json();
        throw Object.assign(new Error(`${error.code}: ${error.message}`), { final: true });
      }
      for await (const event of events(response)) {
        lastId = event.id;
        if (event.event === 'error') {
          throw Object.assign(new Error(`${event.data.code}: ${event.data.message}`), { final: true });
        }
        if (event.event !== 'started' || !started) yield event;
        started = true;
        if (event.event === 'end') return;
      }
    } catch (error) {
      if (error.final || resumes === MAX_RESUMES) throw error;
    }
    await sleep(Math.random() * Math.min(5000, 100 * 2 ** resumes));
    open = () =>
      fetch(`${URL_BASE}/execute/${job_id}`, {
        headers: { 'last-event-id': lastId, 'x-attach-token': attach_token },
      });
  }
}

try {
  const prompt = process.argv[2] ?? 'Once upon a time';
  for await (const { event, data } of generate(prompt, { max_tokens: 40, temperature: 0.7, seed: 7 })) {
    if (event === 'token') process.stdout.write(data.t);
    if (event === 'metrics') console.log(`\n[${data.tokens_per_second.toFixed(0)} tokens/s]`);
    if (event === 'end') console.log(`[${data.tokens_out} tokens, ${data.stop_reason}]`);
  }
} catch (error) {
  console.error(error.message);
  process.exitCode = 1;
}
