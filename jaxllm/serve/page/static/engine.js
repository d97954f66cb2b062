// The view of the engine: follows /engine/events, and draws what there is to see while somebody looks.

import { events, request } from "./api.js";
import { byId } from "./dom.js";
import { EngineModel, PAGE_STATES } from "./model.js";
import { LatencyPanel, PageMapPanel, SequencesPanel, ThroughputPanel, TimelinePanel, TokensPanel } from "./panels.js";
import { number } from "./surface.js";

const FRAME = 100; // milliseconds
const [RETRY, MAX_RETRY] = [1000, 15000];

/** Follow the engine from now on; `onError` hears of every ApiError. */
export function startEngine(onError) {
  const model = new EngineModel();
  const panels = [
    new TokensPanel(byId("chart-tokens"), byId("batch-note")),
    new SequencesPanel(byId("chart-sequences")),
    new PageMapPanel(byId("map"), byId("pages-note")),
    new ThroughputPanel(byId("chart-throughput")),
    new LatencyPanel(byId("chart-latency")),
    new TimelinePanel(byId("timeline")),
  ];
  const draw = () => {
    if (document.hidden || byId("engine").offsetParent === null) return;
    for (const panel of panels) panel.draw(model);
    showTiles(model);
  };
  setInterval(() => requestAnimationFrame(draw), FRAME);
  draw();
  follow(model, onError);
  return model;
}

async function follow(model, onError) {
  let wait = RETRY;
  for (;;) {
    const watching = new AbortController();
    // A tab that nobody sees costs the engine nothing.
    const leave = () => document.hidden && watching.abort();
    document.addEventListener("visibilitychange", leave);
    try {
      await shown();
      const response = await request("engine/events", { signal: watching.signal });
      for await (const message of events(response)) {
        model.take(message);
        wait = RETRY;
        setLink(model.stopped ? "lost" : "live", model.stopped ? "stopped" : "live");
      }
    } catch (error) {
      if (error.name !== "AbortError") await onError(error);
    } finally {
      document.removeEventListener("visibilitychange", leave);
    }
    setLink("lost", document.hidden ? "paused" : "not connected");
    await new Promise((resolve) => setTimeout(resolve, wait));
    wait = Math.min(2 * wait, MAX_RETRY);
  }
}

/** Resolves when the page is in sight. */
function shown() {
  if (!document.hidden) return Promise.resolve();
  return new Promise((resolve) => {
    const look = () => {
      if (document.hidden) return;
      document.removeEventListener("visibilitychange", look);
      resolve();
    };
    document.addEventListener("visibilitychange", look);
  });
}

function setLink(state, text) {
  const link = byId("link");
  link.dataset.state = state;
  if (link.textContent !== text) link.textContent = text;
  link.title = text;
}

function showTiles(model) {
  if (!model.limits) return;
  const total = model.counts.reduce((sum, count) => sum + count, 0);
  const used = (100 * (model.counts[2] + model.counts[3])) / total;
  const durations = model.steps.slice(-32).map((step) => step.duration).filter((d) => d !== undefined).sort((a, b) => a - b);
  tile("running", model.running, `of ${model.limits.max_num_seqs}`);
  tile("waiting", model.waiting);
  tile("cache", used.toFixed(used < 10 ? 1 : 0), "%");
  tile("generated", number(Math.round(model.rate("generated"))), "tok/s");
  tile("prompt", number(Math.round(model.rate("prompt"))), "tok/s");
  tile("step", durations.length ? number(durations[durations.length >> 1]) : "–", "ms");
  PAGE_STATES.forEach((name, state) => (byId(`pages-${name}`).textContent = number(model.counts[state])));
}

function tile(name, value, unit = "") {
  const small = document.createElement("small");
  small.textContent = unit && ` ${unit}`;
  byId(`tile-${name}`).replaceChildren(String(value), small);
}
