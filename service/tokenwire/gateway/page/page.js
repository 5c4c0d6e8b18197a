// One generation at a time: send, show tokens as they come, resume a broken stream, stop.

const PARAMETERS = [
  { name: 'max_tokens', label: 'Max tokens', kind: 'integer', placeholder: 'as the context allows', value: '256' },
  { name: 'temperature', label: 'Temperature', kind: 'number', placeholder: '1', value: '0.7', step: 0.1 },
  { name: 'top_p', label: 'Top p', kind: 'number', placeholder: '1', step: 0.05 },
  { name: 'top_k', label: 'Top k', kind: 'integer', placeholder: 'off' },
  { name: 'min_p', label: 'Min p', kind: 'number', placeholder: 'off', step: 0.05 },
  { name: 'repetition_penalty', label: 'Repetition penalty', kind: 'number', placeholder: '1', step: 0.05 },
  { name: 'seed', label: 'Seed', kind: 'integer', placeholder: 'drawn for each answer', wide: true },
  { name: 'stop', label: 'Stop at (one a line, up to 4)', kind: 'lines', placeholder: 'nothing', wide: true },
];
const RESUME_DELAYS_MS = [200, 500, 1000, 2000, 4000];
const HEALTH_MS = 2000;
const TIMELINE_S = [2, 5, 10, 20, 30, 60, 120, 300, 600];

const $ = (id) => document.getElementById(id);
const form = $('form');
const integer = new Intl.NumberFormat('en');
let run = null;

// The form

function buildFields() {
  for (const item of PARAMETERS) {
    const field = document.createElement('div');
    field.className = item.wide ? 'field wide' : 'field';
    const label = document.createElement('label');
    label.htmlFor = item.name;
    label.textContent = item.label;
    const input = document.createElement(item.kind === 'lines' ? 'textarea' : 'input');
    input.id = input.name = item.name;
    input.placeholder = item.placeholder;
    input.value = item.value || '';
    input.autocomplete = 'off';
    input.setAttribute('aria-describedby', `${item.name}-error`);
    if (item.kind === 'lines') {
      input.rows = 1;
      input.style.minHeight = '2.25rem';
      input.style.padding = '.375rem .625rem';
    } else {
      // Text, not number: a seed has more digits than a number field keeps.
      input.inputMode = item.kind === 'integer' ? 'numeric' : 'decimal';
    }
    const error = document.createElement('p');
    error.className = 'error';
    error.id = `${item.name}-error`;
    field.append(label, input, error);
    $('fields').append(field);
  }
}

/** Name and JSON text of each parameter that was given. What is no number is sent as a string, for the worker to refuse. */
function parameters() {
  const given = [];
  for (const { name, kind } of PARAMETERS) {
    const text = $(name).value;
    if (kind === 'lines') {
      const lines = text.split('\n').filter((line) => line !== '');
      if (lines.length) given.push([name, JSON.stringify(lines)]);
    } else if (text.trim()) {
      const number = text.trim();
      const pattern = kind === 'integer' ? /^-?(0|[1-9]\d*)$/ : /^-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?$/;
      given.push([name, pattern.test(number) ? number : JSON.stringify(number)]);
    }
  }
  return given;
}

const isChat = () => form.elements.kind.value === 'chat';

/** The body as JSON text: a seed would lose digits as a JavaScript number. */
function requestBody(jobId, extra = []) {
  const prompt = $('prompt').value;
  const input = isChat()
    ? ['messages', JSON.stringify([{ role: 'user', content: prompt }])]
    : ['prompt', JSON.stringify(prompt)];
  const pairs = [['job_id', JSON.stringify(jobId)], input, ...parameters(), ...extra];
  return `{${pairs.map(([name, value]) => `${JSON.stringify(name)}: ${value}`).join(', ')}}`;
}

const newId = (prefix) => prefix + Array.from(crypto.getRandomValues(new Uint8Array(12)), (b) => b.toString(16).padStart(2, '0')).join('');

function headers(extra = {}) {
  const key = $('key').value.trim();
  return key ? { ...extra, authorization: `Bearer ${key}` } : extra;
}

// Server-sent events

/** The events of a response, as { kind, id, data }; data is text. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const frames = (rest + value).split('\n\n');
    rest = frames.pop();
    for (const frame of frames) {
      const event = { kind: '', id: '', data: '' };
      for (const line of frame.split('\n')) {
        const colon = line.indexOf(': ');
        const name = line.slice(0, colon);
        if (name === 'event') event.kind = line.slice(colon + 2);
        else if (name === 'id') event.id = line.slice(colon + 2);
        else if (name === 'data') event.data = line.slice(colon + 2);
      }
      if (event.kind) yield event;
    }
  }
}

// A run

class Refusal extends Error {
  constructor(status, error) {
    super(error.message);
    this.status = status;
    this.error = error;
  }
}

async function refusalOf(response) {
  let error = { code: String(response.status), message: response.statusText || 'the request failed' };
  try { error = (await response.json()).error || error; } catch { /* a proxy answered, not the gateway */ }
  return new Refusal(response.status, error);
}

async function generate() {
  if (run) return;
  clearErrors();
  if (!$('prompt').value) {
    showFieldErrors([{ field: 'prompt', message: 'must not be empty' }]);
    $('prompt').focus();
    return;
  }
  run = {
    jobId: newId('page-'), token: newId('t'), abort: new AbortController(), began: performance.now(),
    text: '', next: 0, count: 0, arrivals: [], firstAt: 0, lastAt: 0, seed: '', ended: false, stopped: false, pending: '', metrics: null,
  };
  const mine = run;
  showRunning(true);
  $('answer').replaceChildren();
  announce('Generating');
  try {
    await follow(mine);
  } catch (error) {
    if (!mine.stopped) showFailure(error, mine);
  } finally {
    flush(mine);
    draw(mine);
    run = null;
    showRunning(false);
  }
  if (mine.stopped) {
    $('note').textContent = 'stopped';
    announce(`Stopped after ${mine.count} tokens`);
  }
}

/** Reads the stream to its end. A stream that breaks is taken up where it broke. */
async function follow(mine) {
  const body = requestBody(mine.jobId, [['detach', 'true'], ['attach_token', JSON.stringify(mine.token)]]);
  let request = () => fetch('execute', {
    method: 'POST', body, signal: mine.abort.signal, headers: headers({ 'content-type': 'application/json' }),
  });
  for (let broken = 0; ; broken += 1) {
    const before = mine.next;
    try {
      const response = await request();
      if (!response.ok) {
        const refusal = await refusalOf(response);
        // A proxy that has lost its worker for a moment is a break like any other.
        if (broken === 0 || ![502, 503, 504].includes(refusal.status)) throw refusal;
      } else {
        if (broken) $('note').textContent = '';
        for await (const event of events(response)) receive(mine, event);
        if (mine.ended) return;
      }
    } catch (error) {
      if (mine.stopped || error instanceof Refusal) throw error;
    }
    if (mine.next > before) broken = 0;
    if (broken >= RESUME_DELAYS_MS.length) throw new Error('the connection broke and could not be restored');
    $('note').textContent = 'reconnecting';
    announce('The connection broke. Reconnecting.');
    await new Promise((resolve) => { setTimeout(resolve, RESUME_DELAYS_MS[broken]); });
    if (mine.stopped) return;
    request = () => fetch(`execute/${mine.jobId}?from=${mine.next}`, {
      signal: mine.abort.signal, headers: headers({ 'x-attach-token': mine.token }),
    });
  }
}

function receive(mine, event) {
  const now = performance.now();
  const data = JSON.parse(event.data);
  if (event.kind === 'started') {
    mine.seed = /"seed":(\d+)/.exec(event.data)[1];
    $('n-prompt').textContent = integer.format(data.prompt_tokens);
    $('n-cached').textContent = integer.format(data.cached_tokens);
  } else if (event.kind === 'token') {
    const next = Number(event.id);
    mine.firstAt ||= now;
    mine.lastAt = now;
    for (let i = mine.next; i < next; i += 1) mine.arrivals.push(now - mine.firstAt);
    mine.count += next - mine.next;
    mine.next = next;
    mine.text += data.t;
    mine.pending += data.t;
    mine.frame ||= requestAnimationFrame(() => { mine.frame = 0; flush(mine); draw(mine); });
  } else if (event.kind === 'metrics') {
    mine.metrics = data;
  } else if (event.kind === 'end') {
    mine.ended = true;
    const why = { EOS: 'complete', MAX_TOKENS: 'reached max tokens', STOP_SEQUENCE: 'reached a stop text' }[data.stop_reason] || '';
    const seed = document.createElement('span');
    seed.className = 'seed';
    seed.textContent = ` · seed ${mine.seed}`;
    $('note').replaceChildren(why, seed);
    $('seed').placeholder = `last: ${mine.seed}`;
    announce(`Done: ${data.tokens_out} tokens, ${why}`);
  } else if (event.kind === 'error') {
    mine.ended = true;
    if (!mine.stopped) throw new Refusal(200, data);
  }
}

function stop() {
  if (!run || run.stopped) return;
  run.stopped = true;
  cancel(run.jobId);
  run.abort.abort();
}

function cancel(jobId) {
  const body = JSON.stringify({ job_id: jobId });
  fetch('cancel', { method: 'POST', body, keepalive: true, headers: headers({ 'content-type': 'application/json' }) })
    .catch(() => {});
}

// What is seen

function flush(mine) {
  if (!mine.pending) return;
  const box = $('answer');
  const follows = box.scrollHeight - box.scrollTop - box.clientHeight < 48;
  if (box.lastChild?.nodeType === Node.TEXT_NODE) box.lastChild.appendData(mine.pending);
  else box.append(mine.pending);
  mine.pending = '';
  if (follows) box.scrollTop = box.scrollHeight;
}

function draw(mine) {
  if (mine.firstAt) {
    $('n-ttft').innerHTML = milliseconds(mine.firstAt - mine.began);
    const seconds = (mine.lastAt - mine.firstAt) / 1000;
    const speed = mine.metrics?.tokens_per_second || (seconds > 0 ? (mine.count - 1) / seconds : 0);
    $('n-speed').innerHTML = speed ? `${speed.toFixed(speed < 10 ? 1 : 0)} <small>tokens/s</small>` : '–';
    $('n-tokens').textContent = integer.format(mine.count);
  }
  if (mine.metrics) $('n-queue').innerHTML = milliseconds(mine.metrics.queue_ms);
  const last = (mine.arrivals.at(-1) || 0) / 1000;
  const span = (TIMELINE_S.find((s) => s >= last) || last) * 1000;
  $('ticks').setAttribute('d', mine.arrivals.map((at) => `M${(1 + (at / span) * 998).toFixed(1)} 5V19`).join(''));
}

function milliseconds(value) {
  if (value < 0.1) return '0 <small>ms</small>';
  return value < 1000 ? `${value.toFixed(value < 10 ? 1 : 0)} <small>ms</small>` : `${(value / 1000).toFixed(2)} <small>s</small>`;
}

function showRunning(running) {
  $('go').disabled = running;
  $('halt').disabled = !running;
  $('answer').classList.toggle('running', running);
  $('answer').setAttribute('aria-busy', String(running));
  if (running) {
    $('note').textContent = '';
    $('ticks').setAttribute('d', '');
    for (const id of ['n-ttft', 'n-speed', 'n-tokens', 'n-queue', 'n-prompt', 'n-cached']) $(id).textContent = '–';
    $('copy-answer').disabled = true;
  } else {
    $('copy-answer').disabled = !$('answer').textContent;
    if (document.activeElement === document.body) $('prompt').focus();
  }
}

function showFailure(error, mine) {
  const told = error instanceof Refusal ? error.error : { code: 'CONNECTION', message: error.message };
  const fields = told.details?.fields || [];
  const box = $('alert');
  const title = document.createElement('strong');
  title.textContent = told.message.charAt(0).toUpperCase() + told.message.slice(1);
  box.replaceChildren(title);
  if (told.code === 'UNAUTHENTICATED' || told.code === 'PERMISSION_DENIED') {
    box.append('. Give a key under “API key”.');
    $('key-panel').open = true;
    $('key').focus();
  } else if (mine.count && mine.seed) {
    box.append(`. The same prompt with seed ${mine.seed} gives the same text again.`);
  } else if (told.retriable) {
    box.append('. Try again in a moment.');
  } else {
    box.append('.');
  }
  const code = document.createElement('code');
  code.textContent = ` ${told.code}`;
  box.append(code);
  box.hidden = false;
  showFieldErrors(fields);
}

function showFieldErrors(fields) {
  let first = null;
  for (const { field, message } of fields) {
    const root = field.split(/[.[]/)[0];
    const name = root === 'messages' ? 'prompt' : root;
    const input = $(name);
    const error = $(`${name}-error`);
    if (!input || !error) continue;
    error.textContent = message;
    input.setAttribute('aria-invalid', 'true');
    first ||= input;
  }
  if (first) {
    const panel = first.closest('details');
    if (panel) panel.open = true;
    first.focus();
  }
}

function clearErrors() {
  $('alert').hidden = true;
  for (const error of document.querySelectorAll('.error')) error.textContent = '';
  for (const input of document.querySelectorAll('[aria-invalid]')) input.removeAttribute('aria-invalid');
}

function announce(text) { $('status').textContent = text; }

// The same call in code

const shell = (text) => `'${text.replaceAll("'", "'\\''")}'`;

function code(kind) {
  const key = $('key').value.trim();
  const pairs = parameters();
  const prompt = $('prompt').value || $('prompt').placeholder;
  const json = (chat) => `{${[['job_id', '"my-job-1"'], chat, ...pairs].map(([n, v]) => `"${n}": ${v}`).join(', ')}}`;
  const message = JSON.stringify([{ role: 'user', content: prompt }]);
  if (kind === 'curl') {
    const input = isChat() ? ['messages', message] : ['prompt', JSON.stringify(prompt)];
    const auth = key ? ' \\\n  -H "authorization: Bearer $TOKENWIRE_API_KEY"' : '';
    return `curl -N ${new URL('execute', location.href)} \\\n  -H 'content-type: application/json'${auth} \\\n  -d ${shell(json(input))}`;
  }
  if (kind === 'grpcurl') {
    const input = isChat() ? ['chat', `{"messages": ${message}}`] : ['prompt', JSON.stringify(prompt)];
    const auth = key ? ' \\\n  -H "authorization: Bearer $TOKENWIRE_API_KEY"' : '';
    return `grpcurl -plaintext${auth} \\\n  -d ${shell(json(input))} \\\n  ${location.hostname}:50051 tokenwire.v1.Inference/Execute`;
  }
  const args = [isChat() ? `messages=${python(message)}` : python(JSON.stringify(prompt)), ...pairs.map(([n, v]) => `${n}=${python(v)}`)];
  const connect = key
    ? `import os\n\nfrom tokenwire.client import Client\n\nkey = os.environ["TOKENWIRE_API_KEY"]\nwith Client("${location.hostname}:50051", metadata=[("authorization", f"Bearer {key}")]) as client:`
    : `from tokenwire.client import Client\n\nwith Client("${location.hostname}:50051") as client:`;
  return `${connect}\n    for event in client.execute(\n        ${args.join(',\n        ')},\n    ):\n        print(getattr(event, "text", ""), end="", flush=True)`;
}

/** JSON that holds strings, numbers, lists and objects only is Python too, save for halves of a surrogate pair. */
function python(text) { return text; }

let codeKind = 'curl';
function showCode() { $('code-text').textContent = code(codeKind); }

function selectTab(tab) {
  for (const other of document.querySelectorAll('[role="tab"]')) {
    const chosen = other === tab;
    other.setAttribute('aria-selected', String(chosen));
    other.tabIndex = chosen ? 0 : -1;
  }
  codeKind = tab.id.replace('tab-', '');
  $('code').setAttribute('aria-labelledby', tab.id);
  showCode();
}

async function copy(button, text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // not a secure origin: the old way
    const area = document.createElement('textarea');
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand('copy');
    area.remove();
  }
  button.textContent = 'Copied';
  announce('Copied');
  setTimeout(() => { button.textContent = 'Copy'; }, 1500);
}

// Health

async function showHealth() {
  let state = 'bad';
  let text = 'not reachable';
  try {
    const report = await (await fetch('health', { cache: 'no-store' })).json();
    const busy = report.active ? `, ${report.active} running` : '';
    const waiting = report.queued ? `, ${report.queued} waiting` : '';
    if (report.status === 'unhealthy') {
      text = report.phase === 'loading' ? `loading, ${report.load_percent} %` : report.phase || 'not ready';
      state = report.phase === 'loading' ? 'waiting' : 'bad';
    } else {
      text = `${report.model} on ${report.device_name || report.device.replace('cpu', 'the CPU')}${busy}${waiting}`;
      state = 'good';
    }
  } catch { /* shown as not reachable */ }
  $('health').dataset.state = state;
  $('health-text').textContent = text;
  $('health-text').title = text;
}

// Start

buildFields();
if (matchMedia('(max-width: 60rem)').matches) {
  $('parameters').open = false;
  $('code-panel').open = false;
}
showCode();
showHealth();
setInterval(() => { if (!document.hidden) showHealth(); }, HEALTH_MS);

form.addEventListener('submit', (event) => { event.preventDefault(); generate(); });
form.addEventListener('input', showCode);
$('halt').addEventListener('click', stop);
document.addEventListener('keydown', (event) => {
  if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) { event.preventDefault(); generate(); }
  if (event.key === 'Escape') stop();
});
$('copy-answer').addEventListener('click', () => copy($('copy-answer'), $('answer').textContent));
$('copy-code').addEventListener('click', () => copy($('copy-code'), $('code-text').textContent));
for (const tab of document.querySelectorAll('[role="tab"]')) {
  tab.addEventListener('click', () => selectTab(tab));
  tab.addEventListener('keydown', (event) => {
    const step = { ArrowRight: 'nextElementSibling', ArrowLeft: 'previousElementSibling' }[event.key];
    const other = step && tab[step];
    if (other) { selectTab(other); other.focus(); }
  });
}
// A page that goes away leaves no job behind.
addEventListener('pagehide', () => { if (run) cancel(run.jobId); });
