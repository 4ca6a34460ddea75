// Which curves a run has, and how they are read.

const DATA = JSON.parse(document.getElementById("data").textContent);
const COLOURS = ["c1", "c2", "c3", "c4"];
// The second run is grey and dashed, its first, second, ... curve by the kind of dash.
const DASHES = ["6 4", "2 4", "9 3 2 3", "1 3"];

const FIGURES = [
  {
    title: "Response length",
    height: 240,
    caption: "Tokens of a response: the mean, and the range from the shortest to the longest.",
    zero: true,
    lines: [
      ["mean", "completions/mean_length", ["completions/min_length", "completions/max_length"]],
      ["soft positions", "soft/length"],
    ],
  },
  {
    title: "Cut-offs and flat groups",
    caption: "Share of responses that reached the token limit; share of groups whose rewards are all equal.",
    percent: true,
    zero: true,
    lines: [["cut off", "completions/clipped_ratio"], ["flat groups", "frac_reward_zero_std"]],
  },
  {
    title: "Candidates of a soft position",
    caption: "Effective number 1/Σw² of the mixture, and how many candidates the nucleus kept.",
    lines: [["effective", "soft/effective_candidates"], ["kept", "soft/kept_slots"]],
  },
  {
    title: "Weight of the top candidate",
    caption: "Mean over soft positions; at 1 soft thinking is discrete thinking.",
    lines: [["top weight", "soft/top_weight"]],
  },
  {
    title: "Engine against trainer",
    caption: "How far their log-probabilities of the same candidates differ, log scale. It should stay flat.",
    log: true,
    lines: [
      ["mean", "sampling/sampling_logp_difference/mean"],
      ["max", "sampling/sampling_logp_difference/max"],
    ],
  },
  {
    title: "Ratios beyond the bound",
    caption: "Share of positions whose engine/trainer ratio is beyond algorithm.correction.max.",
    percent: true,
    zero: true,
    lines: [["share", "sampling/beyond_max_ratio"]],
  },
  {
    title: "Entropy",
    caption: "Of the policy over the recorded candidates, in nats.",
    zero: true,
    lines: [["entropy", "candidate_entropy"]],
  },
  {
    title: "Loss",
    caption: "Of the policy update. Near zero by construction; it is no measure of progress.",
    lines: [["loss", "loss"]],
  },
  {
    title: "Gradient norm",
    caption: "Before clipping.",
    zero: true,
    lines: [["norm", "grad_norm"]],
  },
  {
    title: "KL divergence",
    caption: "From the reference model.",
    zero: true,
    lines: [["KL", "kl"]],
  },
  {
    title: "Clipped ratios",
    caption: "Share of positions whose probability ratio was clipped. Zero with one update a step.",
    percent: true,
    zero: true,
    lines: [["low", "clip_ratio/low_mean"], ["high", "clip_ratio/high_mean"]],
  },
  {
    title: "Rollout speed",
    caption: "Generated tokens a second.",
    zero: true,
    lines: [["tokens/s", "tokens_per_second"]],
  },
];

// From so many steps on every curve is drawn faint, with its moving average on top.
const LONG = 150;

function averageWindow(run) {
  return Math.max(5, Math.round(run.step.length / 20));
}

function columnOf(run, name) {
  return run.columns[name] ?? run.step.map(() => null);
}

/** Style of the i-th curve of a run: colours for the run itself, grey dashes for the other one. */
function styleOf(runIndex, i) {
  return runIndex === 0 ? { className: COLOURS[i] } : { className: "other", dash: DASHES[i] };
}

function labelOf(runIndex, label) {
  return runIndex === 0 ? label : `${DATA.runs[runIndex].name}: ${label}`;
}

function curvesOf(lines) {
  return DATA.runs.flatMap((run, r) =>
    lines.flatMap(([label, name, band], i) => {
      if (!(name in run.columns)) return [];
      const curve = { label: labelOf(r, label), steps: run.step, values: run.columns[name], ...styleOf(r, i) };
      if (run.step.length > LONG) curve.average = movingAverage(curve.values, averageWindow(run));
      if (band && r === 0) curve.band = { low: columnOf(run, band[0]), high: columnOf(run, band[1]) };
      return [curve];
    }),
  );
}

/** Reward of every step, its average, its spread inside the groups, and the evaluations. */
function rewardLines(run, r) {
  const lines = [];
  const values = run.columns.reward;
  if (values) {
    const window = averageWindow(run);
    const smooth = { steps: run.step, values: movingAverage(values, window), kind: "smooth", ...styleOf(r, 0) };
    if (r === 0) {
      const raw = { label: "reward", steps: run.step, values, kind: "raw", ...styleOf(r, 0) };
      raw.band = spreadBand(values, columnOf(run, "reward_std"));
      lines.push(raw);
    }
    lines.push({ label: labelOf(r, `average of ${window} steps`), ...smooth });
  }
  return [...lines, ...evaluationLines(run, r)];
}

/** One standard deviation around the mean, kept inside [0, 1] where the rewards are. */
function spreadBand(values, stds) {
  const inside = values.every((v) => v === null || (v >= 0 && v <= 1));
  const edge = (sign) =>
    values.map((v, i) => {
      if (v === null || stds[i] === null) return null;
      const at = v + sign * stds[i];
      return inside ? Math.max(0, Math.min(1, at)) : at;
    });
  return { low: edge(-1), high: edge(1) };
}

/** mean@n and pass@k of the largest k, as points. */
function evaluationLines(run, r) {
  const names = [...new Set(run.evals.flatMap((row) => Object.keys(row)))];
  const largest = (kind) =>
    names
      .filter((name) => new RegExp(`^eval/${kind}@\\d+$`).test(name))
      .sort((a, b) => Number(b.split("@")[1]) - Number(a.split("@")[1]))[0];
  return [["mean", "circle"], ["pass", "diamond"]].flatMap(([kind, shape], i) => {
    const rows = run.evals.filter((row) => (row[largest(kind)] ?? null) !== null);
    if (rows.length === 0) return [];
    const name = largest(kind);
    const label = labelOf(r, `held-out ${name.slice("eval/".length)}`);
    const [steps, values] = [rows.map((row) => row.step), rows.map((row) => row[name])];
    return [{ label, steps, values, kind: "points", shape, ...styleOf(r, i + 1) }];
  });
}

function rewardFigure() {
  const lines = DATA.runs.flatMap(rewardLines);
  return {
    title: "Reward",
    caption: "Mean of a step; the band is one standard deviation inside a group. Points are held-out evaluations.",
    wide: true,
    whole: true,
    height: 240,
    lines,
  };
}

/** The reward functions one by one, where there are several. */
function functionsFigure() {
  const names = Object.keys(DATA.runs[0].columns).filter((name) => /^rewards\/.*\/mean$/.test(name));
  const lines = names.slice(0, COLOURS.length).map((name) => [name.slice("rewards/".length, -"/mean".length), name]);
  return { title: "Reward functions", caption: "Mean of each.", lines: lines.length > 1 ? curvesOf(lines) : [] };
}

function timeFigure() {
  const run = DATA.runs[0];
  const names = ["rollout", "train", "reward", "sync"].filter((name) => `time/${name}` in run.columns);
  const long = run.step.length > LONG;
  const smooth = (values) => (long ? movingAverage(values, averageWindow(run)) : values);
  const areas = names.map((name, i) => ({
    label: name,
    steps: run.step,
    values: smooth(run.columns[`time/${name}`]),
    className: COLOURS[i],
  }));
  const other = DATA.runs.slice(1).filter((r) => r.columns.step_time);
  const lines = other.map((r) => {
    return { label: `${r.name}: whole step`, steps: r.step, values: smooth(r.columns.step_time), ...styleOf(1, 0) };
  });
  const caption = `Seconds in each phase, one on top of the other${long ? ", averaged" : ""}.`;
  return { title: "Time of a step", caption, areas, lines };
}

/** First and last step of all that is drawn, so that the cursor stands at one place in every figure. */
function stepSpan() {
  const steps = DATA.runs.flatMap((run) => [...run.step, ...run.evals.map((row) => row.step)]);
  const first = steps.reduce((a, b) => Math.min(a, b), Infinity);
  const last = steps.reduce((a, b) => Math.max(a, b), -Infinity);
  return first < last ? [first, last] : [first - 1, last + 1];
}

function drawFigures(host) {
  const others = FIGURES.map((figure) => ({ ...figure, lines: curvesOf(figure.lines) }));
  const figures = [rewardFigure(), functionsFigure(), ...others, timeFigure()].filter(
    (figure) => figure.lines.length + (figure.areas?.length ?? 0) > 0,
  );
  const span = stepSpan();
  if (DATA.runs[0].step.length > LONG) {
    const note = ` Faint lines are single steps, strong ones the average of ${averageWindow(DATA.runs[0])} steps.`;
    host.previousElementSibling.append(note);
  }
  host.append(...figures.map((figure) => new Chart({ ...figure, span }).element));
  if (figures.length === 0) host.append(html("p", {}, "No step has been recorded yet."));
}

drawFigures(document.getElementById("figures"));
setCursor(null);
