// The page of an evaluation: curves, questions, samples.

const DATA = JSON.parse(document.getElementById("data").textContent);
const MODE_COLOURS = { soft: "c1", discrete: "c2" };
const DASHES = ["", "6 4", "2 4", "9 3 2 3"]; // by temperature

const MOST_BANDS = 2; // more of them hide each other

/** The cells of a task: its modes and temperatures. */
function cellsOf(task) {
  return DATA.cells.filter((cell) => cell.task === task);
}

function styleOf(cell) {
  const dash = DASHES[DATA.temperatures.indexOf(cell.temperature) % DASHES.length];
  return { className: MODE_COLOURS[cell.mode], ...(dash ? { dash } : {}) };
}

function passFigure(task, i) {
  const ks = DATA.cells[0].pass.value.map((_, k) => k + 1);
  const lines = cellsOf(i).map((cell) => ({
    label: cell.label,
    steps: ks,
    values: cell.pass.value,
    band: cellsOf(i).length <= MOST_BANDS ? { low: cell.pass.low, high: cell.pass.high } : null,
    ...styleOf(cell),
  }));
  const caption = DATA.estimator === "unbiased" ? "Unbiased estimate from all samples." : "Estimate from the first k samples.";
  const span = ks.length > 1 ? [1, ks.length] : [0, 2];
  return { title: `${task.label}: pass@k`, caption, unit: "k", whole: true, height: 240, span, lines };
}

/** Outline of a histogram: each bin from its first to its last length. */
function lengthFigure(task, i) {
  const { edges } = task;
  const steps = edges.slice(1).flatMap((end, b) => (end - edges[b] > 1 ? [edges[b], end - 1] : [edges[b]]));
  const outline = (shares) => shares.flatMap((share, b) => (edges[b + 1] - edges[b] > 1 ? [share, share] : [share]));
  const lines = cellsOf(i).map((cell) => {
    const values = outline(cell.lengths);
    const band = cellsOf(i).length <= MOST_BANDS ? { low: values.map(() => 0), high: values } : null;
    return { label: cell.label, steps, values, band, ...styleOf(cell) };
  });
  const caption = "Share of responses by their number of tokens.";
  const span = [edges[0], Math.max(edges.at(-1) - 1, edges[0] + 1)];
  return { title: `${task.label}: response length`, caption, unit: "length", percent: true, zero: true, height: 240, span, lines };
}

function drawFigures(host) {
  const figures = DATA.tasks.flatMap((task, i) => [passFigure(task, i), lengthFigure(task, i)]);
  host.append(...figures.map((figure) => new Chart(figure).element));
}

function countRight(samples) {
  return samples.filter(([right]) => right).length;
}

/** One square for every question of every cell. */
class HeatMap {
  constructor(host, open) {
    this.squares = new Map();
    host.className = "heat";
    host.append(html("p", { class: "key" }, "none right", html("span", { class: "ramp" }), "all right"));
    DATA.tasks.forEach((task, i) => host.append(html("h3", {}, task.label), ...cellsOf(i).map((cell) => this.run(cell))));
    host.addEventListener("click", (event) => {
      const place = this.squares.get(event.target);
      if (place) open(...place);
    });
  }

  run(cell) {
    const squares = cell.samples.map((samples, question) => {
      const right = countRight(samples);
      const square = html("span", { class: "square", title: `question ${question}: ${right} of ${samples.length} right` });
      square.style.background = `color-mix(in oklab, var(--c1) ${(100 * right) / samples.length}%, var(--grid))`;
      this.squares.set(square, [cell, question]);
      return square;
    });
    const label = `${cell.label}: share of right samples of ${squares.length} questions`;
    return html("div", { class: "run" }, html("span", {}, cell.label), html("div", { class: "squares", role: "img", "aria-label": label }, ...squares));
  }

  mark(cell, question) {
    for (const [square, [c, q]] of this.squares) square.classList.toggle("here", c === cell && q === question);
  }
}

/** Chooses a task, a cell, a question and a sample, and shows it. */
class Browser {
  constructor(host, heat) {
    this.heat = heat;
    this.task = this.select("Task", DATA.tasks.map((task) => task.label));
    this.cell = this.select("Run", []);
    this.question = this.select("Question", []);
    this.back = html("button", { type: "button" }, "Previous");
    this.forth = html("button", { type: "button" }, "Next");
    this.chips = html("div", { class: "chips", role: "group", "aria-label": "Samples of this question" });
    this.card = html("div", { class: "sample" });
    const selects = (DATA.tasks.length > 1 ? [this.task] : []).concat(this.cell, this.question);
    const turn = html("div", { class: "row" }, this.back, this.forth);
    host.append(html("div", { class: "controls" }, ...selects.map((s) => s.parentNode), turn), this.chips, this.card);
    this.task.addEventListener("change", () => this.fillCells());
    this.cell.addEventListener("change", () => this.fillQuestions(this.question.selectedIndex));
    this.question.addEventListener("change", () => this.showQuestion());
    this.back.addEventListener("click", () => this.turn(-1));
    this.forth.addEventListener("click", () => this.turn(1));
    this.fillCells();
  }

  select(label, texts) {
    const select = html("select", {});
    html("label", {}, label, select);
    this.fill(select, texts);
    return select;
  }

  fill(select, texts) {
    select.replaceChildren(...texts.map((text, i) => html("option", { value: i }, text)));
  }

  get chosenCell() {
    return cellsOf(this.task.selectedIndex)[this.cell.selectedIndex];
  }

  fillCells() {
    this.fill(this.cell, cellsOf(this.task.selectedIndex).map((cell) => cell.label));
    const shown = this.chosenCell.shown;
    const first = Object.keys(shown).map(Number).find((q) => countRight(this.chosenCell.samples[q]) > 0);
    this.fillQuestions(first ?? 0);
  }

  fillQuestions(index) {
    this.fill(this.question, this.chosenCell.samples.map((s, i) => `${i}: ${countRight(s)} of ${s.length} right`));
    this.question.selectedIndex = index;
    this.showQuestion();
  }

  open(cell, question) {
    this.task.selectedIndex = cell.task;
    this.fill(this.cell, cellsOf(cell.task).map((c) => c.label));
    this.cell.selectedIndex = cellsOf(cell.task).indexOf(cell);
    this.fillQuestions(question);
    this.card.scrollIntoView({ block: "center" });
  }

  turn(by) {
    this.question.selectedIndex += by;
    this.showQuestion();
  }

  showQuestion() {
    const question = this.question.selectedIndex;
    const cell = this.chosenCell;
    this.back.disabled = question <= 0;
    this.forth.disabled = question >= this.question.length - 1;
    this.heat.mark(cell, question);
    const shown = cell.shown[question] ?? {};
    this.buttons = {};
    const chips = cell.samples[question].map(([right, answer, tokens], i) => {
      const sign = html("span", { class: right ? "right" : "wrong" }, right ? "✓" : "✗");
      const text = ` ${i + 1}: ${answer === null ? "no answer" : answer}, ${tokens} tokens`;
      if (!(i in shown)) return html("span", { class: "chip plain", title: answer ?? "" }, sign, text);
      this.buttons[i] = html("button", { type: "button", class: "chip", title: answer ?? "" }, sign, text);
      this.buttons[i].addEventListener("click", () => this.show(i));
      return this.buttons[i];
    });
    this.chips.replaceChildren(...chips);
    const indices = Object.keys(shown).map(Number);
    if (indices.length) this.show(indices.find((i) => cell.samples[question][i][0]) ?? indices[0]);
    else this.card.replaceChildren(html("p", {}, "To keep this page small, it holds no sample of this question; results.json has them all."));
  }

  show(index) {
    const question = this.question.selectedIndex;
    const cell = this.chosenCell;
    const { prompt, gold } = DATA.tasks[cell.task].questions[question];
    for (const [i, button] of Object.entries(this.buttons)) button.setAttribute("aria-pressed", Number(i) === index);
    const positions = cell.shown[question][index].map((position) => unpackPosition(position, DATA.vocabulary));
    const [right, answer, tokens, cut] = cell.samples[question][index];
    const facts = [
      ["Grade", right ? "right" : "wrong"],
      ["Answer", answer ?? "none"],
      ["Gold", gold || "tests"],
      ["Ended by", cut ? "the token limit" : "itself"],
      ["Positions", `${tokens}, ${positions.filter((p) => p.soft).length} of them soft`],
    ];
    this.card.replaceChildren(
      html("dl", { class: "facts" }, ...facts.map(([k, v]) => html("div", {}, html("dt", {}, k), html("dd", {}, v)))),
      html("h3", {}, "Prompt"),
      html("div", { class: "text", tabindex: 0 }, prompt),
      html("h3", {}, "Completion"),
      ...(positions.length ? [tokenKeys(), new TokenView(positions).element] : [html("p", {}, "(empty)")]),
    );
  }
}

drawFigures(document.getElementById("figures"));
for (const unit of ["k", "length"]) setCursor(null, unit);
let browser = null;
const heat = new HeatMap(document.getElementById("heat"), (cell, question) => browser.open(cell, question));
browser = new Browser(document.getElementById("viewer"), heat);
const theme = new URLSearchParams(location.search).get("theme");
if (theme === "light" || theme === "dark") document.documentElement.style.colorScheme = theme;
