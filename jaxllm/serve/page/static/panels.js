// Each panel draws one side of the model on its canvas. Steps have an axis of steps, the rest one of time.

import { PAGE_STATES } from "./model.js";
import { color, line, number, Plot, Surface } from "./surface.js";

const BAR = 4; // pixels of a step, a gap of one of them
const SPAN = 60; // seconds
const SPANS = [4, 12, 20, 40, 60, 120, 240, 600, 1200, 3600];
const [ROW, BARS] = [22, 10]; // pixels of a row of the timeline, and of its bar

/** The steps that fit the width of a plot, and where the newest of them ends. */
function visible(plot, steps) {
  const shown = steps.slice(-Math.floor(plot.width / BAR));
  return shown.map((step, i) => [step, plot.right - (shown.length - i) * BAR]);
}

function stepLabels(plot, bars) {
  if (bars.length === 0) return plot.empty("no step yet");
  const labels = [[plot.right, `step ${bars.at(-1)[0].step}`]];
  if (bars.length > 40) labels.unshift([bars[0][1], `${bars[0][0].step}`]);
  plot.labels(labels);
}

export class TokensPanel {
  constructor(canvas, note) {
    this.surface = new Surface(canvas);
    this.note = note;
  }

  draw({ steps, limits }) {
    const shown = steps.slice(-Math.floor(this.surface.canvas.clientWidth / BAR));
    const plot = new Plot(this.surface, Math.max(4, ...shown.map((s) => s.shapeTokens)), "tokens");
    const { context } = plot;
    const bars = visible(plot, steps);
    for (const [step, x] of bars) {
      const parts = [["padding", 0, step.shapeTokens], ["decode", 0, step.tokens - step.prefill], ["prefill", step.tokens - step.prefill, step.tokens]];
      for (const [name, low, high] of parts) {
        if (high <= low) continue;
        context.fillStyle = color(name);
        // A single token shall be seen beside a long prompt.
        const height = Math.max(plot.y(low) - plot.y(high), 2);
        context.fillRect(x, plot.y(low) - height, BAR - 1, height);
      }
    }
    if (limits) plot.limit(limits.max_num_batched_tokens, `budget ${number(limits.max_num_batched_tokens)}`);
    stepLabels(plot, bars);
    const { pointer } = this.surface;
    const hovered = pointer && bars.find(([, x]) => pointer.x >= x && pointer.x < x + BAR);
    const step = hovered ? hovered[0] : steps.at(-1);
    if (hovered) {
      context.strokeStyle = color("muted");
      line(context, hovered[1] + 1.5, plot.top, hovered[1] + 1.5, plot.bottom);
    }
    this.note.textContent = step ? describe(step, limits) : "Each bar is a step: what it computes, in the shape that it was compiled for.";
  }
}

function describe(step, limits) {
  const took = step.duration === undefined ? "" : `, ${number(step.duration)} ms`;
  return (
    `step ${step.step}: ${step.tokens} of ${number(limits.max_num_batched_tokens)} tokens ` +
    `(${step.prefill} prefill), ${step.sequences} of ${limits.max_num_seqs} sequences, ` +
    `shape ${step.shapeTokens} × ${step.shapeSequences}${took}`
  );
}

export class SequencesPanel {
  constructor(canvas) {
    this.surface = new Surface(canvas);
  }

  draw({ steps, limits }) {
    const shown = steps.slice(-Math.floor(this.surface.canvas.clientWidth / BAR));
    const plot = new Plot(this.surface, Math.max(2, ...shown.map((s) => Math.max(s.running, s.waiting))), "sequences");
    const { context } = plot;
    const bars = visible(plot, steps);
    context.fillStyle = color("decode");
    for (const [step, x] of bars) context.fillRect(x, plot.y(step.running), BAR - 1, plot.bottom - plot.y(step.running));
    if (bars.some(([step]) => step.waiting)) {
      plot.path(bars.map(([step, x]) => [x + BAR / 2, plot.y(step.waiting)]), "preempted");
    }
    if (limits) plot.limit(limits.max_num_seqs, `at most ${limits.max_num_seqs}`);
    context.textAlign = "left";
    context.textBaseline = "alphabetic";
    context.fillStyle = color("decode");
    context.fillText("running", plot.left, plot.bottom + 14);
    context.fillStyle = color("preempted");
    context.fillText("waiting", plot.left + 46, plot.bottom + 14);
  }
}

/** Every page a cell; where there are more pages than cells, a cell is several, in the colour of the most used. */
export class PageMapPanel {
  constructor(canvas, note) {
    this.surface = new Surface(canvas);
    this.note = note;
  }

  draw({ pages, limits }) {
    const context = this.surface.begin();
    const { width, height, pointer } = this.surface;
    const count = pages.length - 1;
    if (!limits || count < 1 || width < 8) return;
    let size = Math.min(16, Math.floor(Math.sqrt((width * height) / count)));
    while (size > 4 && Math.floor(width / size) * Math.floor(height / size) < count) size -= 1;
    size = Math.max(size, 4);
    const columns = Math.floor(width / size);
    const pitch = width / columns; // the last column ends where the panel does
    const perCell = Math.ceil(count / (columns * Math.floor(height / size)));
    const cells = Math.ceil(count / perCell);
    const gap = size > 5 ? 2 : 1;
    for (let cell = 0; cell < cells; cell++) {
      let state = 0;
      const end = Math.min(count, (cell + 1) * perCell);
      for (let page = cell * perCell; page < end; page++) state = Math.max(state, pages[page + 1]);
      context.fillStyle = color(PAGE_STATES[state]);
      const x = Math.round((cell % columns) * pitch);
      const next = Math.round(((cell % columns) + 1) * pitch);
      context.fillRect(x, Math.floor(cell / columns) * size, next - x - gap, size - gap);
    }
    const at = pointer && Math.floor(pointer.y / size) * columns + Math.min(columns - 1, Math.floor(pointer.x / pitch));
    const first = at * perCell + 1;
    if (pointer && at < cells) {
      const last = Math.min(count, first + perCell - 1);
      const name = PAGE_STATES[Math.max(...pages.subarray(first, last + 1))];
      this.note.textContent = perCell === 1 ? `page ${first}: ${name}` : `pages ${first} to ${last}: ${name}`;
    } else {
      const each = perCell === 1 ? "a cell each" : `${perCell} in a cell`;
      this.note.textContent = `${number(count)} pages of ${limits.page_size} tokens, ${each}`;
    }
  }
}

export class ThroughputPanel {
  constructor(canvas) {
    this.surface = new Surface(canvas);
  }

  draw(model) {
    const now = model.limits ? model.now() / 1000 : 0;
    const newest = Math.floor(now) - 1; // the second that is not over would look like a drop
    const seconds = Array.from({ length: SPAN + 2 }, (_, i) => newest - SPAN - 1 + i);
    const values = (kind) => seconds.map((s) => model.seconds.get(s)?.[kind] ?? 0);
    const [prompt, generated] = [values("prompt"), values("generated")];
    const plot = new Plot(this.surface, Math.max(10, ...prompt, ...generated), "tokens/s");
    const x = (second) => plot.right - ((newest - second + (now % 1)) / SPAN) * plot.width;
    plot.context.save();
    plot.context.beginPath();
    plot.context.rect(plot.left, 0, plot.width, plot.bottom + 1);
    plot.context.clip();
    plot.path(seconds.map((s, i) => [x(s), plot.y(prompt[i])]), "prefill");
    plot.path(seconds.map((s, i) => [x(s), plot.y(generated[i])]), "decode");
    plot.context.restore();
    plot.seconds(SPAN);
  }
}

export class LatencyPanel {
  constructor(canvas) {
    this.surface = new Surface(canvas);
  }

  draw(model) {
    const from = model.limits ? model.now() - 1000 * SPAN : 0;
    const firsts = model.firstTokens.filter((first) => first.time > from);
    const seconds = [...model.seconds].filter(([second, { durations }]) => 1000 * second > from && durations.length);
    const steps = seconds.map(([second, { durations }]) => [1000 * second + 500, quantiles(durations)]).sort(byTime);
    const values = [...steps.flatMap(([, [, middle, high]]) => [middle, high]), ...firsts.map((first) => first.wait)];
    const plot = new Plot(this.surface, Math.max(100, ...values), "ms", Math.min(1, ...values.filter((value) => value > 0)));
    const { context } = plot;
    const x = (time) => Math.min(plot.right, plot.left + ((time - from) / (1000 * SPAN)) * plot.width);
    // Nine in ten of a second's steps lie on the bar, and half of them below the line.
    context.fillStyle = color("decode");
    context.globalAlpha = 0.25;
    for (const [time, [low, , high]] of steps) {
      context.fillRect(x(time) - 1, plot.y(high), 3, Math.max(plot.y(low) - plot.y(high), 1));
    }
    context.globalAlpha = 1;
    plot.path(steps.map(([time, [, middle]]) => [x(time), plot.y(middle)]), "decode");
    context.fillStyle = color("shared");
    for (const first of firsts) {
      context.beginPath();
      context.arc(x(first.time), plot.y(first.wait), 3, 0, 2 * Math.PI);
      context.fill();
    }
    plot.seconds(SPAN);
  }
}

const byTime = ([one], [other]) => one - other;

/** The 5th, 50th and 95th percentile. */
function quantiles(values) {
  const sorted = [...values].sort((a, b) => a - b);
  return [0.05, 0.5, 0.95].map((share) => sorted[Math.round(share * (sorted.length - 1))]);
}

/** A row for each of the newest requests, and on it what became of it when. */
export class TimelinePanel {
  constructor(canvas) {
    this.surface = new Surface(canvas);
  }

  draw(model) {
    const context = this.surface.begin();
    const { width, height } = this.surface;
    const narrow = width < 480;
    const [left, right, bottom] = [narrow ? 92 : 150, width - 4, height - 18];
    const now = model.limits ? model.now() : 0;
    const rows = Math.floor(bottom / ROW);
    const recent = model.ended.filter((request) => request.finished > now - 1000 * SPAN);
    const requests = [...recent, ...model.requests.values()].sort((a, b) => b.number - a.number).slice(0, rows);
    // So many seconds that all of them fit, and short ones are more than a dot.
    const oldest = Math.min(now, ...requests.map((request) => request.arrival));
    const span = SPANS.find((seconds) => 1000 * seconds >= now - oldest) ?? SPANS.at(-1);
    const from = now - 1000 * span;
    const x = (time) => left + ((Math.max(time, from) - from) / (1000 * span)) * (right - left);
    context.textBaseline = "middle";
    requests.forEach((request, row) => {
      const middle = row * ROW + ROW / 2;
      context.textAlign = "left";
      context.fillStyle = color("ink");
      context.fillText(`#${request.number}`, 0, middle);
      context.fillStyle = color("muted");
      const output = request.output ?? "…";
      context.fillText(narrow ? `${request.prompt} + ${output}` : `${request.prompt} + ${output} tokens`, 36, middle);
      context.strokeStyle = color("grid");
      line(context, left, middle, right, middle);
      for (const { phase, from: began, to = null } of request.spans) {
        if ((to ?? now) < from) continue;
        const thick = phase === "queued" || phase === "preempted" ? BARS - 4 : BARS;
        context.fillStyle = color(phase);
        context.fillRect(x(began), middle - thick / 2, Math.max(x(to ?? now) - x(began), 1.5), thick);
      }
      if (request.finished) this.end(context, x(request.finished), middle, request.reason, right);
    });
    context.fillStyle = color("muted");
    if (requests.length === 0) {
      context.textAlign = "center";
      context.fillText("no request in the last minute", width / 2, bottom / 2);
    }
    context.textBaseline = "alphabetic";
    for (let i = 0; i <= 4; i++) {
      context.textAlign = i === 0 ? "left" : i === 4 ? "right" : "center";
      context.fillText(i === 4 ? "now" : `−${number(span - (span * i) / 4)} s`, left + (i / 4) * (right - left), height - 4);
    }
  }

  end(context, at, middle, reason, right) {
    context.fillStyle = color("muted");
    const before = at > right - 44;
    context.textAlign = before ? "right" : "left";
    if (!before) context.fillText(reason, at + 5, middle);
  }
}
