// Chooses a sample and shows it.

const FILTERS = {
  all: () => true,
  "above 0": (sample) => sample.reward > 0,
  "0 or below": (sample) => sample.reward !== null && sample.reward <= 0,
  "not scored": (sample) => sample.reward === null,
};
const PHASES = { train: "training", eval: "held-out" };

class Viewer {
  constructor(host, { vocabulary, rows }) {
    this.vocabulary = vocabulary;
    this.rows = rows;
    this.phase = this.select("Phase", (value) => value === "all" || rows.some((row) => row.phase === value), {
      all: "all",
      ...Object.fromEntries(rows.map((row) => [row.phase, PHASES[row.phase] ?? row.phase])),
    });
    const filters = Object.fromEntries(Object.keys(FILTERS).map((name) => [name, name]));
    this.filter = this.select("Reward", (value) => rows.some(FILTERS[value]), filters);
    this.step = this.select("Step", () => true, {});
    this.back = html("button", { type: "button" }, "Previous");
    this.forth = html("button", { type: "button" }, "Next");
    this.picks = html("div", { class: "picks", role: "group", "aria-label": "Samples of this step" });
    this.card = html("div", { class: "sample" });
    const turn = html("div", { class: "row" }, this.back, this.forth);
    const fields = [this.phase, this.filter, this.step].map((select) => select.parentNode);
    host.append(html("div", { class: "controls" }, ...fields, turn), this.picks, this.card);
    this.phase.addEventListener("change", () => this.refilter());
    this.filter.addEventListener("change", () => this.refilter());
    this.step.addEventListener("change", () => this.showStep());
    this.back.addEventListener("click", () => this.turn(-1));
    this.forth.addEventListener("click", () => this.turn(1));
    this.refilter();
  }

  /** A labelled select with those of the options (value: text) that are allowed. */
  select(label, allowed, options) {
    const values = Object.entries(options).filter(([value]) => allowed(value));
    const select = html("select", {}, ...values.map(([value, text]) => html("option", { value }, text)));
    html("label", {}, label, select);
    return select;
  }

  refilter() {
    const wanted = this.step.value;
    const phase = this.phase.value;
    this.found = this.rows.filter((row) => (phase === "all" || row.phase === phase) && FILTERS[this.filter.value](row));
    const steps = [...new Set(this.found.map((row) => row.step))].sort((a, b) => a - b);
    this.step.replaceChildren(...steps.map((step) => html("option", { value: step }, String(step))));
    this.step.value = steps.includes(Number(wanted)) && wanted !== "" ? wanted : (steps.at(-1) ?? "");
    this.showStep();
  }

  showStep() {
    this.group = this.found.filter((row) => String(row.step) === this.step.value);
    this.back.disabled = this.step.selectedIndex <= 0;
    this.forth.disabled = this.step.selectedIndex >= this.step.length - 1;
    this.buttons = this.group.map((row, i) => {
      const text = `${PHASES[row.phase] ?? row.phase} ${i + 1}: reward ${format(row.reward)}`;
      const button = html("button", { type: "button" }, text);
      button.addEventListener("click", () => this.show(i));
      return button;
    });
    this.picks.replaceChildren(...this.buttons);
    if (this.group.length) this.show(this.mostMixed());
    else this.card.replaceChildren(html("p", {}, "No sample fits this choice."));
  }

  /** The sample of the step that shows soft thinking best. */
  mostMixed() {
    const peaks = this.group.map((row) =>
      row.positions.reduce((peak, p) => Math.max(peak, unpackPosition(p, this.vocabulary).effective), 0),
    );
    return peaks.indexOf(Math.max(...peaks));
  }

  turn(by) {
    this.step.selectedIndex += by;
    this.showStep();
  }

  show(index) {
    this.buttons.forEach((button, i) => button.setAttribute("aria-pressed", i === index));
    const sample = this.group[index];
    const positions = sample.positions.map((position) => unpackPosition(position, this.vocabulary));
    const completion = positions.length
      ? [tokenKeys(), new TokenView(positions).element]
      : [html("div", { class: "text" }, sample.text || "(empty)")];
    this.card.replaceChildren(
      this.facts(sample, positions),
      html("h3", {}, "Prompt"),
      html("div", { class: "text", tabindex: 0 }, sample.prompt),
      html("h3", {}, "Answer"),
      html("div", { class: "text" }, sample.answer),
      html("h3", {}, "Completion"),
      ...completion,
    );
  }

  facts(sample, positions) {
    const ended = { stop: "stop: ended by itself", length: "length: cut off", abort: "abort" };
    const soft = positions.filter((position) => position.soft).length;
    const facts = [
      ["Reward", format(sample.reward)],
      ["Advantage", format(sample.advantage)],
      ["Finish reason", ended[sample.finish] ?? sample.finish],
      ["Positions", positions.length ? `${positions.length}, ${soft} of them soft` : "not recorded"],
      ["Sample", sample.uid],
    ];
    return html("dl", { class: "facts" }, ...facts.map(([k, v]) => html("div", {}, html("dt", {}, k), html("dd", {}, v))));
  }
}

function drawViewer(host) {
  if (DATA.samples.rows.length === 0) {
    host.append(html("p", {}, "No samples have been recorded."));
    return;
  }
  if (DATA.samplesEvery > 1) {
    host.append(html("p", { class: "note" }, `To keep this page small it holds one in ${DATA.samplesEvery} of the recorded samples.`));
  }
  new Viewer(host, DATA.samples);
}

drawViewer(document.getElementById("viewer"));
const theme = new URLSearchParams(location.search).get("theme");
if (theme === "light" || theme === "dark") document.documentElement.style.colorScheme = theme;
