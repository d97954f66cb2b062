// Tokens coloured by their probability, with what else might have stood there.

import { byId, element } from "./dom.js";

const BOUNDS = [0.1, 0.25, 0.5, 0.75, 0.9];

/** Which of the six shades a log-probability has: 0 is the least likely, 5 has no colour. */
export function shade(logprob) {
  const p = Math.exp(logprob);
  const found = BOUNDS.findIndex((bound) => p < bound);
  return found === -1 ? BOUNDS.length : found;
}

/** An element for an entry of a chat's logprobs. */
export function tokenElement(entry) {
  const token = element("span", `token p${shade(entry.logprob)}`, entry.token);
  token.entry = entry;
  return token;
}

/** The shades, in words. */
export function scale() {
  const swatches = [0, 1, 2, 3, 4, 5].map((step) => element("i", `p${step}`));
  return element("span", "scale", "unsure", ...swatches, "sure");
}

/** Show the tip over the tokens inside an element: on hover, and on a tap. */
export function explain(container) {
  const tip = byId("tip");
  let chosen = null;
  const hide = () => {
    chosen?.classList.remove("chosen");
    chosen = null;
    tip.hidden = true;
  };
  const show = (token) => {
    if (chosen === token) return;
    hide();
    chosen = token;
    chosen.classList.add("chosen");
    const { entry } = token;
    const listed = entry.top_logprobs.some((other) => other.token === entry.token);
    const rows = listed ? entry.top_logprobs : [entry, ...entry.top_logprobs];
    tip.replaceChildren(
      ...rows.map((row) =>
        element("div", row.token === entry.token ? "own" : "other",
          element("code", "", JSON.stringify(row.token)), element("span", "", percent(row.logprob)))),
    );
    tip.hidden = false;
    const [at, size] = [token.getBoundingClientRect(), tip.getBoundingClientRect()];
    const above = at.top - size.height - 6;
    tip.style.left = `${Math.max(8, Math.min(at.left, innerWidth - size.width - 8))}px`;
    tip.style.top = `${above >= 8 ? above : at.bottom + 6}px`;
  };
  for (const kind of ["pointerover", "click"]) {
    container.addEventListener(kind, (event) => {
      const token = event.target.closest(".token");
      if (token) show(token);
      else hide();
    });
  }
  container.addEventListener("pointerleave", hide);
  container.addEventListener("scroll", hide);
}

function percent(logprob) {
  const p = 100 * Math.exp(logprob);
  return p > 0 && p < 0.01 ? "< 0.01 %" : `${p.toFixed(p < 10 ? 2 : 1)} %`;
}
