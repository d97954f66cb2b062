// A canvas in CSS pixels, sharp on every screen, with the colours of the style sheet and axes.

const FONT = '11px system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif';
const LEFT = 44;
const [RIGHT, TOP, BOTTOM] = [4, 20, 18];

const dark = matchMedia("(prefers-color-scheme: dark)");
const cache = new Map();
dark.addEventListener("change", () => cache.clear());

/** The value of a colour of the style sheet. */
export function color(name) {
  if (!cache.has(name)) {
    cache.set(name, getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim());
  }
  return cache.get(name);
}

/** A canvas to draw on; its height is what its attribute says. */
export class Surface {
  constructor(canvas) {
    this.canvas = canvas;
    this.height = Number(canvas.getAttribute("height"));
    canvas.style.height = `${this.height}px`;
    this.context = canvas.getContext("2d");
    this.pointer = null;
    canvas.addEventListener("pointermove", (event) => (this.pointer = { x: event.offsetX, y: event.offsetY }));
    canvas.addEventListener("pointerleave", () => (this.pointer = null));
  }

  /** Clear it, in the size that it has now; the context, whose unit is a CSS pixel. */
  begin() {
    this.width = this.canvas.clientWidth;
    const scale = devicePixelRatio || 1;
    const [width, height] = [Math.round(this.width * scale), Math.round(this.height * scale)];
    if (this.canvas.width !== width || this.canvas.height !== height) {
      Object.assign(this.canvas, { width, height });
    }
    this.context.setTransform(scale, 0, 0, scale, 0, 0);
    this.context.clearRect(0, 0, this.width, this.height);
    this.context.font = FONT;
    return this.context;
  }
}

/** Where a chart's values lie on its surface, and its axes. */
export class Plot {
  /**
   * @param most the largest value that must fit
   * @param unit stands above the axis
   * @param least the smallest value of a logarithmic axis; without one the axis is linear, from 0
   */
  constructor(surface, most, unit, least = null) {
    this.context = surface.begin();
    this.left = LEFT;
    this.right = surface.width - RIGHT;
    this.top = TOP;
    this.bottom = surface.height - BOTTOM;
    this.width = this.right - this.left;
    if (least === null) {
      const step = niceStep(most / (this.bottom - this.top < 70 ? 2 : 3));
      const count = Math.max(1, Math.ceil(most / step - 1e-9));
      this.scale = (value) => value / (step * count);
      this.most = step * count;
      this.grid(Array.from({ length: count + 1 }, (_, i) => i * step), unit);
    } else {
      const low = Math.floor(Math.log10(least));
      const high = Math.max(Math.ceil(Math.log10(most) - 1e-9), low + 1);
      this.scale = (value) => Math.max(0, (Math.log10(value) - low) / (high - low));
      this.most = 10 ** high;
      this.grid(Array.from({ length: high - low + 1 }, (_, i) => 10 ** (low + i)), unit);
    }
  }

  y(value) {
    return this.bottom - this.scale(value) * (this.bottom - this.top);
  }

  grid(values, unit) {
    const { context } = this;
    context.textAlign = "right";
    context.textBaseline = "middle";
    context.lineWidth = 1;
    values.forEach((value, i) => {
      const y = Math.round(this.y(value)) + 0.5;
      context.strokeStyle = color(i === 0 ? "line" : "grid");
      line(context, this.left, y, this.right, y);
      context.fillStyle = color("muted");
      context.fillText(number(value), this.left - 6, y);
    });
    context.textAlign = "left";
    context.textBaseline = "top";
    context.fillText(unit, 0, 0);
  }

  /** Labels below the axis: [x, text], the first and the last of them inside the plot. */
  labels(entries) {
    const { context } = this;
    context.fillStyle = color("muted");
    context.textBaseline = "alphabetic";
    for (const [x, text] of entries) {
      context.textAlign = x < this.left + 20 ? "left" : x > this.right - 20 ? "right" : "center";
      context.fillText(text, x, this.bottom + 14);
    }
  }

  /** The seconds before now, below the axis. */
  seconds(span) {
    const count = this.width < 260 ? 2 : 4;
    this.labels(
      Array.from({ length: count + 1 }, (_, i) => {
        const ago = span - (i * span) / count;
        return [this.left + (i * this.width) / count, ago === 0 ? "now" : `−${ago} s`];
      }),
    );
  }

  /** A line through [x, y] in the surface's own pixels. */
  path(points, name) {
    const { context } = this;
    context.strokeStyle = color(name);
    context.lineWidth = 1.5;
    context.lineJoin = "round";
    context.beginPath();
    for (const [x, y] of points) context.lineTo(x, y);
    context.stroke();
  }

  /** A dashed line at a limit that is in sight, with its name. */
  limit(value, text) {
    if (value > this.most) return;
    const { context } = this;
    const y = Math.round(this.y(value)) + 0.5;
    context.save();
    context.setLineDash([4, 3]);
    context.strokeStyle = color("muted");
    line(context, this.left, y, this.right, y);
    context.restore();
    context.fillStyle = color("muted");
    context.textAlign = "right";
    context.textBaseline = "bottom";
    context.fillText(text, this.right, y - 2);
  }

  /** Words where there is nothing to draw. */
  empty(text) {
    const { context } = this;
    context.fillStyle = color("muted");
    context.textAlign = "center";
    context.textBaseline = "middle";
    context.fillText(text, (this.left + this.right) / 2, (this.top + this.bottom) / 2);
  }
}

export function line(context, x0, y0, x1, y1) {
  context.beginPath();
  context.moveTo(x0, y0);
  context.lineTo(x1, y1);
  context.stroke();
}

/** A number in few characters: 0.25, 12, 1,200, 34k. */
export function number(value) {
  if (value >= 1e6) return `${trim(value / 1e6)}M`;
  if (value >= 1e4) return `${trim(value / 1e3)}k`;
  if (value >= 1000) return Math.round(value).toLocaleString("en");
  return trim(value);
}

function trim(value) {
  return String(Number(value.toFixed(value < 1 ? 2 : value < 100 ? 1 : 0)));
}

function niceStep(value) {
  const power = 10 ** Math.floor(Math.log10(Math.max(value, 1e-9)));
  const lead = value / power;
  return power * (lead <= 1 ? 1 : lead <= 2 ? 2 : lead <= 5 ? 5 : 10);
}
