// A completion token by token: what every position was a mixture of.

const WEIGHT_SCALE = 10000;

/** A position of the data ([flags, token, candidate, weight, ...]) in readable form. */
function unpackPosition([flags, token, ...pairs], vocabulary) {
  const candidates = [];
  for (let i = 0; i < pairs.length; i += 2) {
    candidates.push({ text: vocabulary[pairs[i]], weight: pairs[i + 1] / WEIGHT_SCALE });
  }
  return readablePosition(vocabulary[token], (flags & 1) === 1, (flags & 2) === 2, candidates);
}

/** A position as it is in samples.jsonl and in the answers of the server. */
function readPosition({ token, kind, forced, candidates }) {
  return readablePosition(token, kind === 1, forced, candidates.map(([text, weight]) => ({ text, weight })));
}

function readablePosition(token, soft, forced, candidates) {
  candidates.sort((a, b) => b.weight - a.weight);
  const sum = candidates.reduce((total, c) => total + c.weight, 0);
  const squares = candidates.reduce((total, c) => total + c.weight ** 2, 0);
  return { token, soft, forced, candidates, effective: squares > 0 ? sum ** 2 / squares : 1 };
}

/** Text with whitespace and control characters as muted signs. */
function visibleText(text) {
  if (text === "") return [html("span", { class: "sign" }, "∅")];
  const signs = { " ": "·", "\n": "↵", "\t": "⇥", "\r": "␍", "\u00a0": "⍽" };
  return text.split(/([\s\u0000-\u001f\u007f])/u).flatMap((part) => {
    if (part === "") return [];
    const code = part.codePointAt(0);
    const sign = signs[part] ?? (code < 0x20 ? String.fromCodePoint(0x2400 + code) : null);
    return [sign === null ? part : html("span", { class: "sign" }, sign)];
  });
}

function weightColour(weight) {
  return `color-mix(in oklab, var(--weight-high) ${(100 * weight).toFixed(1)}%, var(--weight-low))`;
}

/** The stacked bar under a soft token as a background, one segment a candidate. */
function mixtureBar(candidates) {
  let begin = 0;
  const stops = candidates.map(({ weight }, i) => {
    const [from, to] = [100 * begin, 100 * (begin + weight)];
    begin += weight;
    const gap = i + 1 < candidates.length && candidates[i + 1].weight > 0.04 ? "1px" : "0px";
    const edge = `calc(${to.toFixed(2)}% - ${gap})`;
    return `${weightColour(weight)} ${from.toFixed(2)}% ${edge}, var(--surface) ${edge} ${to.toFixed(2)}%`;
  });
  return `linear-gradient(to right, ${stops.join(", ")}, transparent 0)`;
}

function tokenSpan(position, attributes = {}) {
  const mixed = position.soft && position.candidates.length > 0 && position.candidates[0].weight < 0.9;
  const kinds = `tok ${position.soft ? "soft" : "discrete"}${mixed ? " mixed" : ""}${position.forced ? " forced" : ""}`;
  const span = html("span", { ...attributes, class: kinds }, ...visibleText(position.token));
  if (position.soft) span.style.backgroundImage = mixtureBar(position.candidates);
  return span;
}

/** What bars, dots and boxes mean. */
function tokenKeys() {
  const example = (token, soft, forced, weights) =>
    tokenSpan({ token, soft, forced, candidates: weights.map((weight) => ({ weight })) });
  const item = (span, text) => html("li", {}, span, html("span", {}, text));
  return html(
    "ul",
    { class: "keys" },
    item(example("47", true, false, [0.6, 0.25, 0.15]), "soft: one segment a candidate, as long as its weight"),
    item(example("47", false, false, []), "discrete: dotted, one token"),
    item(example("47", false, true, []), "forced: boxed, put there by a budget"),
    html("li", {}, "weight 0", html("span", { class: "ramp" }), "1"),
    html("li", {}, "· space  ↵ newline"),
  );
}

/**
 * The completion of one sample: tokens, strip of effective candidates, details of one position. It
 * shows the position that is mixed most until the reader chooses one; more can be appended.
 */
class TokenView {
  constructor(positions, label = "Completion, token by token") {
    this.id = `view-${TokenView.count++}`;
    this.positions = [];
    this.spans = [];
    this.tokens = html("div", { class: "tokens", tabindex: 0, role: "listbox", "aria-label": label });
    this.details = html("div", { class: "details" });
    this.pinned = 0;
    this.chosen = false;
    const left = html("div", {}, this.tokens, ...this.makeStrip());
    this.element = html("div", { class: "split" }, left, this.details);
    this.listen();
    this.append(positions);
  }

  append(positions) {
    for (const position of positions) {
      const index = this.positions.push(position) - 1;
      const span = tokenSpan(position, { role: "option", id: `${this.id}-${index}`, "aria-selected": false });
      this.spans.push(span);
      this.tokens.append(span);
      if (position.token.includes("\n")) this.tokens.append(html("br"));
      if (!this.chosen && position.effective > this.positions[this.pinned].effective) this.pinned = index;
    }
    if (this.positions.length === 0) return;
    this.drawStrip();
    if (!this.tokens.matches(":hover")) this.show(this.pinned);
  }

  listen() {
    const indexOf = (event) => this.spans.indexOf(event.target.closest?.(".tok"));
    this.tokens.addEventListener("pointerover", (event) => indexOf(event) >= 0 && this.show(indexOf(event)));
    this.tokens.addEventListener("click", (event) => indexOf(event) >= 0 && this.pin(indexOf(event)));
    this.tokens.addEventListener("pointerleave", () => this.show(this.pinned));
    this.tokens.addEventListener("keydown", (event) => {
      const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -10, ArrowDown: 10, Home: -1e9, End: 1e9 };
      if (!(event.key in moves)) return;
      event.preventDefault();
      const last = this.positions.length - 1;
      this.pin(Math.max(0, Math.min(last, this.pinned + moves[event.key])));
      this.spans[this.pinned].scrollIntoView({ block: "nearest" });
    });
  }

  pin(index) {
    if (this.positions.length === 0) return;
    this.chosen = true;
    this.pinned = index;
    this.details.setAttribute("aria-live", "polite");
    this.show(index);
  }

  show(index) {
    if (!(index in this.positions)) return;
    this.spans[this.shown]?.classList.remove("active");
    this.spans[this.shown]?.setAttribute("aria-selected", "false");
    this.shown = index;
    this.spans[index].classList.add("active");
    this.spans[index].setAttribute("aria-selected", "true");
    this.tokens.setAttribute("aria-activedescendant", `${this.id}-${index}`);
    this.here.setAttribute("x", index);
    this.details.replaceChildren(...this.describe(index));
  }

  /** A bar a position, as high as its effective number of candidates. */
  makeStrip() {
    this.strip = svg("svg", { class: "strip", preserveAspectRatio: "none", "aria-hidden": true });
    this.here = svg("rect", { y: 0, width: 1, class: "here" });
    this.line = svg("line", { x1: 0, class: "one" });
    this.bars = { soft: svg("path", { class: "soft" }), plain: svg("path", { class: "plain" }) };
    this.strip.append(this.here, this.line, this.bars.soft, this.bars.plain);
    this.caption = html("h3", {});
    const last = () => this.positions.length - 1;
    const indexOf = (event) => Math.min(last(), Math.floor((event.offsetX / this.strip.clientWidth) * (last() + 1)));
    this.strip.addEventListener("pointermove", (event) => this.show(indexOf(event)));
    this.strip.addEventListener("pointerleave", () => this.show(this.pinned));
    this.strip.addEventListener("click", (event) => {
      this.pin(indexOf(event));
      this.spans[this.pinned].scrollIntoView({ block: "nearest" });
    });
    return [this.caption, this.strip];
  }

  drawStrip() {
    const count = this.positions.length;
    const top = this.positions.reduce((most, p) => Math.max(most, p.effective), 2);
    const bars = (soft) =>
      this.positions
        .map((p, i) => (p.soft === soft ? `M${i + 0.12} ${top}v${-p.effective}h.76v${p.effective}Z` : ""))
        .join("");
    this.strip.setAttribute("viewBox", `0 0 ${count} ${top}`);
    this.strip.style.maxWidth = `${count * 22}px`;
    this.here.setAttribute("height", top);
    for (const [name, value] of [["x2", count], ["y1", top - 1], ["y2", top - 1]]) this.line.setAttribute(name, value);
    this.bars.soft.setAttribute("d", bars(true));
    this.bars.plain.setAttribute("d", bars(false));
    this.caption.textContent = `Effective candidates by position (up to ${format(top)}; the line is 1)`;
  }

  describe(index) {
    const { soft, forced, candidates, effective } = this.positions[index];
    const share = candidates.length > 1 ? `a mixture of ${format(effective)} effective candidates.` : "one candidate has all the weight.";
    const kind = soft ? `Soft: ${share}` : "Discrete: one token, fed as it is.";
    const budget = forced ? " Forced by a budget, not chosen; it does not count in the loss." : "";
    const rows = candidates.flatMap(({ text, weight }) => {
      const bar = html("span", { class: "bar" });
      bar.style.width = `${100 * weight}%`;
      bar.style.background = soft ? weightColour(weight) : "var(--muted)";
      const percent = html("span", { class: "percent" }, `${(100 * weight).toFixed(1)}%`);
      return [html("span", { class: "name" }, ...visibleText(text)), bar, percent];
    });
    return [
      html("h3", {}, `Position ${index + 1} of ${this.positions.length}`),
      html("p", {}, kind + budget),
      html("div", { class: "candidates" }, ...rows),
    ];
  }
}

TokenView.count = 0;
