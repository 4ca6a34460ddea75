// A chat with soft tokens beside discrete ones: every token shows what it was mixed from.

const DATA = JSON.parse(document.getElementById("data").textContent);
const MODES = { both: ["soft", "discrete"], soft: ["soft"], discrete: ["discrete"] };
const byId = (id) => document.getElementById(id);

/** A labelled slider. place: where it stands for the value, which is what it gives, exactly, until
 * it is moved. scale: from its place to the value. */
function slider(label, { min, max, step, value, place = value, scale = (x) => x, title = "" }) {
  const input = html("input", { type: "range", min, max, step, title });
  const output = html("output", {});
  const show = () => (output.textContent = format(value));
  input.value = place;
  input.addEventListener("input", () => {
    value = Number(scale(Number(input.value)).toPrecision(4));
    show();
  });
  show();
  const name = html("span", { class: "named" }, label, output);
  byId("settings").append(html("label", {}, name, input));
  return () => value;
}

function field(label, attributes) {
  const input = html("input", attributes);
  byId("settings").append(html("label", {}, label, input));
  return input;
}

function chooser(label, options) {
  const select = html("select", {}, ...options.map(([value, text]) => html("option", { value }, text)));
  byId("settings").append(html("label", {}, label, select));
  return select;
}

const soft = DATA.soft;
const mode = chooser("Tokens", [["both", "both"], ["soft", "soft"], ["discrete", "discrete"]]);
const tau = slider("tau of the mixture", {
  min: -2, max: 0.3, step: 0.05, value: soft.tau, place: Math.log10(soft.tau), scale: (x) => 10 ** x,
  title: "Small: nearly one token. Large: all candidates alike.",
});
const topP = slider("top-p", { min: 0.05, max: 1, step: 0.05, value: soft.top_p });
const topK = slider("top-k", { min: 1, max: 30, step: 1, value: soft.top_k });
const floor = slider("weight floor", {
  min: 0, max: 0.9, step: 0.01, value: soft.weight_floor,
  title: "Lighter candidates, relative to the heaviest, count as nothing.",
});
const temperature = slider("temperature", { min: 0.1, max: 2, step: 0.1, value: soft.temperature });
const maxTokens = field("most tokens", { type: "number", min: 1, max: DATA.context, value: Math.min(256, DATA.context) });
const seed = field("seed", { type: "number", step: 1, value: 0 });
const key = DATA.key ? field("API key", { type: "password", autocomplete: "off" }) : null;
byId("settings").addEventListener("submit", (event) => event.preventDefault());
byId("keys").append(tokenKeys());

/** What each kind of tokens has answered so far: the two go on with their own answers. */
let history = { soft: [], discrete: [] };
let running = null; // what Stop aborts

function body(kind, messages) {
  const asked = DATA.chat ? { messages } : { prompt: messages.map((message) => message.content).join("") };
  const common = {
    ...asked, stream: true, return_positions: true,
    max_tokens: maxTokens.valueAsNumber, seed: seed.valueAsNumber || 0,
    temperature: temperature(), top_p: topP(), top_k: topK(),
  };
  if (kind === "discrete") return { ...common, soft: 0 };
  return {
    ...common, soft: 1, soft_tau: tau(), soft_top_p: topP(), soft_top_k: topK(),
    soft_temperature: temperature(), soft_weight_floor: floor(),
  };
}

/** The events of an answer; raises an Error with the server's words. */
async function* events(kind, messages, signal) {
  const path = DATA.chat ? "v1/chat/completions" : "v1/completions";
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key.value}`;
  const response = await fetch(path, { method: "POST", headers, body: JSON.stringify(body(kind, messages)), signal });
  if (!response.ok) {
    const said = await response.json().catch(() => null); // a proxy's is no JSON
    throw new Error(said?.error?.message ?? `${response.status} ${response.statusText}`);
  }
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("the connection was lost");
    const lines = (rest + value).split("\n\n");
    rest = lines.pop();
    for (const line of lines) {
      const data = line.slice("data: ".length);
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event.choices[0];
    }
  }
}

/** One answer while it comes. */
class Answer {
  constructor(kind) {
    this.kind = kind;
    this.text = "";
    this.view = new TokenView([], `${kind} answer, token by token`);
    this.facts = html("span", {}, "waiting");
    this.whole = html("div", { class: "whole" });
    const as = html("details", {}, html("summary", {}, "As text"), this.whole);
    const name = html("div", { class: "named" }, html("b", {}, kind), this.facts);
    this.element = html("article", { class: "sample answer", "aria-label": `${kind} answer` }, name, this.view.element, as);
  }

  async read(messages, signal) {
    const start = performance.now();
    let end = "stopped";
    try {
      for await (const choice of events(this.kind, messages, signal)) {
        this.view.append(choice.positions.map(readPosition));
        this.text += DATA.chat ? (choice.delta.content ?? "") : choice.text;
        this.whole.textContent = this.text;
        this.view.tokens.scrollTop = this.view.chosen ? this.view.tokens.scrollTop : 1e9;
        end = choice.finish_reason === "length" ? "cut at the most tokens" : "ended";
        this.tell(start, choice.finish_reason ? end : "");
      }
    } catch (error) {
      if (error.name === "AbortError") this.tell(start, "stopped");
      else this.element.append(html("p", { class: "wrong", role: "alert" }, error.message));
    }
  }

  tell(start, end) {
    const { positions } = this.view;
    const rate = positions.length / ((performance.now() - start) / 1000);
    const mean = positions.reduce((sum, p) => sum + p.effective, 0) / (positions.length || 1);
    const mixed = this.kind === "soft" ? `, ${format(mean)} candidates a token` : "";
    this.facts.textContent = `${positions.length} tokens, ${format(rate)}/s${mixed}${end && `, ${end}`}`;
  }
}

async function ask(text) {
  const answers = MODES[mode.value].map((kind) => new Answer(kind));
  const turn = html(
    "section", { class: "turn" },
    html("div", { class: "said" }, text),
    html("div", { class: "answers" }, ...answers.map((answer) => answer.element)),
  );
  byId("turns").append(turn);
  turn.scrollIntoView({ block: "start" });
  running = new AbortController();
  setBusy(true);
  const question = { role: "user", content: text };
  const { signal } = running;
  const before = history; // Clear begins another
  await Promise.all(answers.map((answer) => answer.read([...before[answer.kind], question], signal)));
  for (const { kind, text: content } of answers) {
    if (content) before[kind].push(question, { role: "assistant", content });
  }
  setBusy(false);
}

function setBusy(busy) {
  byId("send").disabled = busy;
  byId("stop").disabled = !busy;
  byId("status").textContent = busy ? "Generating; Esc stops." : "";
}

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const prompt = byId("prompt");
  if (byId("send").disabled || prompt.value.trim() === "") return;
  const text = prompt.value;
  prompt.value = "";
  ask(text);
});
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  byId("ask").requestSubmit();
});
document.addEventListener("keydown", (event) => event.key === "Escape" && running?.abort());
byId("stop").addEventListener("click", () => running?.abort());
byId("clear").addEventListener("click", () => {
  running?.abort();
  history = { soft: [], discrete: [] };
  byId("turns").replaceChildren();
  byId("prompt").focus();
});
byId("prompt").focus();
