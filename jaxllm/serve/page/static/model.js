// The engine as its events tell it: steps, pages and requests. No drawing, and no page.

export const PAGE_STATES = ["free", "cached", "owned", "shared"];

const MAX_STEPS = 2000;
const MAX_ENDED = 60;
const SECONDS = 60;

/** What is known of an engine. All times are milliseconds of the engine's clock. */
export class EngineModel {
  constructor() {
    this.limits = null;
    this.reset();
  }

  reset() {
    this.pages = new Uint8Array(0);
    this.counts = [0, 0, 0, 0];
    this.steps = [];
    this.requests = new Map();
    this.ended = [];
    this.firstTokens = [];
    this.seconds = new Map();
    this.lastResult = -Infinity;
    this.running = this.waiting = 0;
    this.stopped = false;
  }

  /** The engine's time now, as far as the messages' delays let one know. */
  now() {
    return performance.now() + this.offset;
  }

  take(message) {
    if (message.type === "snapshot") this.begin(message);
    else if (message.type === "events") for (const event of message.events) this.on(event);
    else if (message.type === "stopped") this.stopped = true;
  }

  begin(snapshot) {
    this.reset();
    this.limits = snapshot.limits;
    this.offset = snapshot.time / 1000 - performance.now();
    this.running = snapshot.running;
    this.waiting = snapshot.waiting;
    this.pages = new Uint8Array(snapshot.limits.num_pages);
    this.counts = [snapshot.limits.num_pages - 1, 0, 0, 0];
    this.change(snapshot.pages);
    for (const [number, phase, arrival, started, first, prompt, most] of snapshot.requests) {
      const request = this.arrive(arrival / 1000, number, prompt, most);
      if (started !== null) this.enter(request, "prefill", started / 1000);
      if (first !== null) this.enter(request, "decode", first / 1000);
      request.firstToken = first === null ? null : first / 1000;
      if (request.phase !== phase) this.enter(request, phase, this.now());
    }
  }

  on([kind, micros, ...rest]) {
    const time = micros / 1000;
    // Messages are late by a varying time; the least delay seen is the best guess.
    if (kind !== "arrival") this.offset = Math.max(this.offset, time - performance.now());
    this["on_" + kind](time, ...rest);
  }

  on_arrival(time, number, prompt, most) {
    this.arrive(time, number, prompt, most);
    this.waiting += 1;
  }

  on_plan(time, step, [shapeTokens, shapeSequences], sequences, tokens, prefill, running, waiting, started, preempted, pages) {
    Object.assign(this, { running, waiting });
    this.steps.push({ step, time, shapeTokens, shapeSequences, sequences, tokens, prefill, running, waiting });
    if (this.steps.length > MAX_STEPS) this.steps.splice(0, this.steps.length - MAX_STEPS);
    for (const number of preempted) this.enter(this.requests.get(number), "preempted", time);
    for (const [number, found] of started) {
      const request = this.requests.get(number);
      request.cached ??= found;
      this.enter(request, "prefill", time);
    }
    this.second(time).prompt += prefill;
    this.change(pages);
  }

  on_result(time, step, tokens, decoding, ended, pages) {
    const planned = this.steps.findLast((known) => known.step === step);
    if (planned) {
      planned.result = time;
      planned.duration = time - Math.max(planned.time, this.lastResult);
      this.second(time).durations.push(planned.duration);
    }
    this.lastResult = time;
    for (const number of decoding) {
      const request = this.requests.get(number);
      this.enter(request, "decode", time);
      if (request.firstToken === null) {
        request.firstToken = time;
        this.firstTokens.push({ time, wait: time - request.arrival });
        if (this.firstTokens.length > MAX_STEPS) this.firstTokens.shift();
      }
    }
    this.second(time).generated += tokens;
    for (const end of ended) this.end(time, end);
    this.change(pages);
  }

  on_end(time, end, pages) {
    this.end(time, end);
    this.change(pages);
  }

  on_forgotten(time, pages) {
    this.change(pages);
  }

  arrive(time, number, prompt, most) {
    const request = { number, prompt, most, arrival: time, firstToken: null, cached: null, phase: null, spans: [] };
    this.requests.set(number, request);
    this.enter(request, "queued", time);
    return request;
  }

  enter(request, phase, time) {
    const last = request.spans.at(-1);
    if (last) last.to = time;
    request.phase = phase;
    request.spans.push({ phase, from: time, to: null });
  }

  end(time, [number, reason, output]) {
    const request = this.requests.get(number);
    if (request.phase === "queued" || request.phase === "preempted") this.waiting = Math.max(0, this.waiting - 1);
    else this.running = Math.max(0, this.running - 1);
    request.spans.at(-1).to = time;
    Object.assign(request, { phase: "finished", reason, output, finished: time });
    this.requests.delete(number);
    this.ended.push(request);
    if (this.ended.length > MAX_ENDED) this.ended.shift();
  }

  change(runs) {
    for (let i = 0; i < runs.length; i += 3) {
      const [first, count, state] = [runs[i], runs[i + 1], runs[i + 2]];
      for (let page = first; page < first + count; page++) {
        if (page === 0) continue; // the null page
        this.counts[this.pages[page]] -= 1;
        this.counts[state] += 1;
        this.pages[page] = state;
      }
    }
  }

  second(time) {
    const key = Math.floor(time / 1000);
    let found = this.seconds.get(key);
    if (!found) {
      this.seconds.set(key, (found = { prompt: 0, generated: 0, durations: [] }));
      for (const old of this.seconds.keys()) if (old < key - SECONDS - 2) this.seconds.delete(old);
    }
    return found;
  }

  /** Tokens a second over the last whole seconds. */
  rate(kind, seconds = 3) {
    const now = Math.floor(this.now() / 1000);
    let sum = 0;
    for (let s = now - seconds; s < now; s++) sum += this.seconds.get(s)?.[kind] ?? 0;
    return sum / seconds;
  }
}
