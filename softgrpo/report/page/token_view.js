// A completion token by token: what every position was a mixture of.

const WEIGHT_SCALE = 10000;

/** A position of the data ([flags, token, candidate, weight, ...]) in readable form. */
function unpackPosition([flags, token, ...pairs], vocabulary) {
  const candidates = [];
  for (let i = 0; i < pairs.length; i += 2) {
    candidates.push({ text: vocabulary[pairs[i]], weight: pairs[i + 1] / WEIGHT_SCALE });
  }
  candidates.sort((a, b) => b.weight - a.weight);
  const sum = candidates.reduce((total, c) => total + c.weight, 0);
  const squares = candidates.reduce((total, c) => total + c.weight ** 2, 0);
  return {
    token: vocabulary[token],
    soft: (flags & 1) === 1,
    forced: (flags & 2) === 2,
    candidates,
    effective: squares > 0 ? sum ** 2 / squares : 1,
  };
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

/** The completion of one sample: tokens, strip of effective candidates, details of one position. */
class TokenView {
  constructor(positions) {
    this.positions = positions;
    this.spans = positions.map((position, i) =>
      tokenSpan(position, { role: "option", id: `position-${i}`, "aria-selected": false }),
    );
    this.tokens = html("div", { class: "tokens", tabindex: 0, role: "listbox", "aria-label": "Completion, token by token" });
    this.spans.forEach((span, i) => {
      this.tokens.append(span);
      if (positions[i].token.includes("\n")) this.tokens.append(html("br"));
    });
    this.details = html("div", { class: "details", "aria-live": "polite" });
    this.pinned = positions.reduce((best, p, i) => (p.effective > positions[best].effective ? i : best), 0);
    const left = html("div", {}, tokenKeys(), this.tokens, ...this.makeStrip());
    this.element = html("div", { class: "split" }, left, this.details);
    this.listen();
    this.show(this.pinned);
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
    this.pinned = index;
    this.show(index);
  }

  show(index) {
    this.spans[this.shown]?.classList.remove("active");
    this.spans[this.shown]?.setAttribute("aria-selected", "false");
    this.shown = index;
    this.spans[index].classList.add("active");
    this.spans[index].setAttribute("aria-selected", "true");
    this.tokens.setAttribute("aria-activedescendant", `position-${index}`);
    this.here.setAttribute("x", index);
    this.details.replaceChildren(...this.describe(index));
  }

  /** A bar a position, as high as its effective number of candidates. */
  makeStrip() {
    const count = this.positions.length;
    const top = Math.max(2, ...this.positions.map((p) => p.effective));
    const strip = svg("svg", { class: "strip", viewBox: `0 0 ${count} ${top}`, preserveAspectRatio: "none", "aria-hidden": true });
    strip.style.maxWidth = `${count * 22}px`;
    this.here = svg("rect", { y: 0, width: 1, height: top, class: "here" });
    strip.append(this.here, svg("line", { x1: 0, x2: count, y1: top - 1, y2: top - 1, class: "one" }));
    const bars = (soft) =>
      this.positions
        .map((p, i) => (p.soft === soft ? `M${i + 0.12} ${top}v${-p.effective}h.76v${p.effective}Z` : ""))
        .join("");
    strip.append(svg("path", { d: bars(true), class: "soft" }), svg("path", { d: bars(false), class: "plain" }));
    const indexOf = (event) => Math.min(count - 1, Math.floor((event.offsetX / strip.clientWidth) * count));
    strip.addEventListener("pointermove", (event) => this.show(indexOf(event)));
    strip.addEventListener("pointerleave", () => this.show(this.pinned));
    strip.addEventListener("click", (event) => {
      this.pin(indexOf(event));
      this.spans[this.pinned].scrollIntoView({ block: "nearest" });
    });
    return [html("h3", {}, `Effective candidates by position (up to ${format(top)}; the line is 1)`), strip];
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
