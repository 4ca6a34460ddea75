// Line and area figures as inline SVG.

/** Round numbers that divide [low, high] into about `count` parts. */
function ticksBetween(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) ticks.push(i * step);
  return ticks;
}

/** Maps data to pixels; on a log scale values that are not positive have no place (null), those below it lie on its floor. */
function makeScale(low, high, from, to, log = false) {
  const place = log ? Math.log10 : (value) => value;
  const [a, b] = [place(low), place(high)];
  return (value) =>
    value === null || value === undefined || (log && value <= 0)
      ? null
      : from + ((place(log ? Math.max(low, value) : value) - a) / (b - a)) * (to - from);
}

/** The path through all points that exist, broken where one is missing; a lone point is a dot. */
function pathThrough(xs, ys) {
  let path = "";
  let drawing = false;
  for (let i = 0; i < xs.length; i++) {
    if (ys[i] === null) {
      drawing = false;
      continue;
    }
    path += `${drawing ? "L" : "M"}${xs[i].toFixed(1)} ${ys[i].toFixed(1)}${drawing ? "" : "h0"}`;
    drawing = true;
  }
  return path;
}

/** The closed shape between two edges, broken where either is missing. */
function pathBetween(xs, lows, highs) {
  let path = "";
  for (let begin = 0; begin < xs.length; begin++) {
    let end = begin;
    while (end < xs.length && lows[end] !== null && highs[end] !== null) end++;
    if (end === begin) continue;
    const point = (i, ys) => `${xs[i].toFixed(1)} ${ys[i].toFixed(1)}`;
    for (let i = begin; i < end; i++) path += (i === begin ? "M" : "L") + point(i, highs);
    for (let i = end - 1; i >= begin; i--) path += "L" + point(i, lows);
    path += "Z";
    begin = end;
  }
  return path;
}

/** Mean of the values of the last `window` places at every place. */
function movingAverage(values, window) {
  return values.map((_, i) => {
    const seen = values.slice(Math.max(0, i + 1 - window), i + 1).filter((v) => v !== null);
    return seen.length ? seen.reduce((a, b) => a + b) / seen.length : null;
  });
}

function markShape(shape, x, y, className) {
  const d =
    shape === "circle"
      ? `M${x - 4} ${y}a4 4 0 1 0 8 0a4 4 0 1 0 -8 0Z`
      : `M${x} ${y - 5.5}L${x + 5.5} ${y}L${x} ${y + 5.5}L${x - 5.5} ${y}Z`;
  return svg("path", { d, class: className });
}

const charts = [];

/** Puts the cursor of every chart over the same unit on a step; null takes it away. */
function setCursor(step, unit = "step") {
  for (const chart of charts.filter((chart) => chart.unit === unit)) chart.cursor(step);
}

/**
 * One figure. spec: {title, caption, span: first and last step, unit ("step"), percent, log, zero, whole, height, wide,
 *   lines: [{label, steps, values, className, dash, kind: "line|raw|smooth|points", shape, band, average}],
 *   areas: [{label, steps, values, className}] stacked from the bottom up}.
 */
class Chart {
  constructor(spec) {
    this.spec = spec;
    this.unit = spec.unit ?? "step";
    this.at = html("span", { class: "at" });
    this.height = spec.height ?? 150;
    const plot = { class: "plot", height: this.height, tabindex: 0, role: "img" };
    this.plot = svg("svg", { ...plot, "aria-label": this.describe() });
    this.element = html(
      "figure",
      spec.wide ? { class: "wide" } : {},
      html("div", { class: "title" }, html("h3", {}, spec.title), this.at),
      html("p", { class: "caption" }, spec.caption),
      this.makeLegend(),
      this.plot,
    );
    this.findDomain();
    this.plot.addEventListener("pointermove", (event) => setCursor(this.stepAt(event.offsetX), this.unit));
    this.plot.addEventListener("pointerdown", (event) => setCursor(this.stepAt(event.offsetX), this.unit));
    this.plot.addEventListener("pointerleave", () => setCursor(null, this.unit));
    this.plot.addEventListener("blur", () => setCursor(null, this.unit));
    this.plot.addEventListener("keydown", (event) => this.onKey(event));
    new ResizeObserver(() => this.draw()).observe(this.plot);
    charts.push(this);
  }

  get series() {
    return [...(this.spec.areas ?? []), ...(this.spec.lines ?? [])];
  }

  describe() {
    const parts = this.series.map(({ label, steps, values }) => {
      const seen = values.map((v, i) => [steps[i], v]).filter(([, v]) => v !== null);
      const say = ([step, v]) => `${format(v, this.spec.percent)} at ${this.unit} ${step}`;
      return `${label} from ${say(seen[0])} to ${say(seen[seen.length - 1])}`;
    });
    return `${this.spec.title}: ${parts.join("; ")}`;
  }

  makeLegend() {
    this.values = this.series.map(() => html("b"));
    const items = this.series.map((series, i) =>
      html("li", {}, this.swatch(series), html("span", {}, series.label), this.values[i]),
    );
    return html("ul", { class: "legend" }, ...items);
  }

  swatch(series) {
    const box = svg("svg", { width: 20, height: 12, "aria-hidden": true });
    if (this.spec.areas?.includes(series)) {
      box.append(svg("rect", { x: 4, width: 12, height: 12, rx: 2, class: `fill ${series.className}` }));
      return box;
    }
    box.append(svg("path", { d: "M1 6H19", class: `line ${series.kind ?? ""} ${series.className}`, ...dashed(series) }));
    if (series.shape) box.append(markShape(series.shape, 10, 6, this.markClass(series)));
    return box;
  }

  markClass(series) {
    return `mark ${series.className} ${series.shape === "circle" && !series.dash ? "fill" : "hollow"}`;
  }

  findDomain() {
    const { spec } = this;
    this.steps = [...new Set(this.series.flatMap((s) => s.steps))].sort((a, b) => a - b);
    this.stacks = stack(spec.areas ?? []);
    const bands = (spec.lines ?? []).flatMap((l) => (l.band ? [...l.band.low, ...l.band.high] : []));
    const all = [...this.series.flatMap((s) => s.values), ...bands, ...(this.stacks.at(-1)?.high ?? [])];
    const values = all.filter((v) => v !== null && (!spec.log || v > 0));
    let low = values.reduce((a, b) => Math.min(a, b), Infinity);
    let high = values.reduce((a, b) => Math.max(a, b), -Infinity);
    if (values.length === 0) [low, high] = [spec.log ? 0.1 : 0, 1];
    if (spec.whole && low >= 0 && high <= 1) [low, high] = [0, 1];
    if (spec.zero || spec.areas) low = Math.min(0, low);
    if (spec.log) {
      const top = Math.floor(Math.log10(high)) + 1;
      low = 10 ** Math.max(Math.floor(Math.log10(low)), top - 4); // one odd step must not flatten the rest
      high = 10 ** top;
    } else if (low === high) {
      [low, high] = low === 0 ? [0, 1] : [low - Math.abs(low) / 2, high + Math.abs(high) / 2];
    } else if (!spec.whole || high > 1) {
      const margin = 0.05 * (high - low);
      [low, high] = [low === 0 ? 0 : low - margin, high + margin];
    }
    this.domainY = [low, high];
  }

  draw() {
    const { spec, height } = this;
    const width = this.plot.clientWidth;
    if (!width) return;
    this.left = 48;
    this.right = width - 14;
    this.x = makeScale(...this.spec.span, this.left, this.right);
    this.y = makeScale(...this.domainY, height - 20, 8, spec.log);
    this.plot.replaceChildren(...this.drawAxes(width));
    (spec.areas ?? []).forEach((area, i) => this.drawArea(area, this.stacks[i]));
    for (const line of spec.lines ?? []) this.drawLine(line);
    this.cursorLine = svg("line", { y1: 8, y2: height - 20, class: "cursor", visibility: "hidden" });
    this.plot.append(this.cursorLine);
    this.cursor(null);
  }

  drawAxes(width) {
    const { spec, height } = this;
    const [low, high] = this.domainY;
    let ticks = ticksBetween(low, high, 5);
    if (spec.log) {
      const powers = ticksBetween(Math.log10(low), Math.log10(high), 4).filter(Number.isInteger);
      ticks = powers.map((power) => 10 ** power);
    }
    const nodes = [];
    for (const tick of ticks) {
      const y = this.y(tick);
      nodes.push(svg("line", { x1: this.left, x2: this.right, y1: y, y2: y, class: "gridline" }));
      nodes.push(svg("text", { x: this.left - 6, y: y + 4, "text-anchor": "end" }, format(tick, spec.percent)));
    }
    nodes.push(svg("line", { x1: this.left, x2: this.right, y1: height - 20, y2: height - 20, class: "axis" }));
    const whole = ticksBetween(...this.spec.span, Math.max(2, Math.min(8, width / 90)));
    for (const tick of whole.filter(Number.isInteger)) {
      nodes.push(svg("text", { x: this.x(tick), y: height - 5, "text-anchor": "middle" }, String(tick)));
    }
    return nodes;
  }

  drawArea(area, { low, high }) {
    const d = pathBetween(area.steps.map(this.x), low.map(this.y), high.map(this.y));
    this.plot.append(svg("path", { d, class: `area fill ${area.className}` }));
  }

  drawLine(line) {
    const xs = line.steps.map(this.x);
    const ys = line.values.map(this.y);
    if (line.band) {
      const d = pathBetween(xs, line.band.low.map(this.y), line.band.high.map(this.y));
      this.plot.append(svg("path", { d, class: `band fill ${line.className}` }));
    }
    const style = line.average ? "raw" : line.kind === "points" ? "link" : (line.kind ?? "");
    const add = (d, kind) => this.plot.append(svg("path", { d, class: `line ${kind} ${line.className}`, ...dashed(line) }));
    add(pathThrough(xs, ys), style);
    if (line.average) add(pathThrough(xs, line.average.map(this.y)), "smooth");
    for (let i = 0; i < xs.length; i++) {
      if (ys[i] === null) continue;
      const alone = (ys[i - 1] ?? null) === null && (ys[i + 1] ?? null) === null;
      if (line.shape) this.plot.append(markShape(line.shape, xs[i], ys[i], this.markClass(line)));
      else if (alone) this.plot.append(svg("circle", { cx: xs[i], cy: ys[i], r: 2.5, class: `fill ${line.className}` }));
    }
  }

  stepAt(pixel) {
    const [first, last] = this.spec.span;
    const step = first + ((pixel - this.left) / (this.right - this.left)) * (last - first);
    return this.steps[nearest(this.steps, step)];
  }

  onKey(event) {
    const moves = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -1e9, End: 1e9 };
    if (!(event.key in moves)) return;
    event.preventDefault();
    const now = this.step === null ? this.steps.length : nearest(this.steps, this.step);
    const next = Math.max(0, Math.min(this.steps.length - 1, now + moves[event.key]));
    setCursor(this.steps[next], this.unit);
  }

  cursor(step) {
    this.step = step;
    this.at.textContent = `${this.unit} ${step ?? this.steps[this.steps.length - 1]}`;
    this.series.forEach((series, i) => {
      this.values[i].textContent = format(valueAt(series, step), this.spec.percent);
    });
    if (!this.cursorLine) return;
    this.cursorLine.setAttribute("visibility", step === null ? "hidden" : "visible");
    if (step === null) return;
    this.cursorLine.setAttribute("x1", this.x(step));
    this.cursorLine.setAttribute("x2", this.x(step));
  }
}

function dashed(series) {
  return series.dash ? { "stroke-dasharray": series.dash } : {};
}

/** The lower and upper edge of every area when they stand on each other. */
function stack(areas) {
  let floor = areas.length ? areas[0].values.map(() => 0) : [];
  return areas.map(({ values }) => {
    const low = floor;
    const high = values.map((value, i) => low[i] + (value ?? 0));
    floor = high;
    return { low, high };
  });
}

/** Index of the number nearest to `wanted` in an ascending list. */
function nearest(numbers, wanted) {
  let [low, high] = [0, numbers.length - 1];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (numbers[middle] <= wanted) low = middle;
    else high = middle;
  }
  return wanted - numbers[low] <= numbers[high] - wanted ? low : high;
}

/** What a series says at a step: evaluations hold until the next one, curves only at their steps. */
function valueAt(series, step) {
  if (step === null) return series.values.findLast((v) => v !== null);
  if (series.kind === "points") return series.values[series.steps.findLastIndex((s) => s <= step)];
  const i = series.steps.length ? nearest(series.steps, step) : -1;
  return series.steps[i] === step ? series.values[i] : null;
}
