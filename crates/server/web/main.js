// Wires the page: views, panels, theme, settings.
import * as api from "./api.js";
import * as chat from "./chat.js";
import { $, h } from "./dom.js";
import * as live from "./live.js";
import * as store from "./store.js";

/** Sampling fields: [name in the API, label, min, max, step]. Stop sequences are text. */
const SAMPLING = [
  ["temperature", "Temperature", 0, 2, 0.05],
  ["top_p", "Top p", 0, 1, 0.01],
  ["top_k", "Top k", 0, 100000, 1],
  ["min_p", "Min p", 0, 1, 0.01],
  ["repetition_penalty", "Repetition penalty", 0.1, 2, 0.05],
  ["presence_penalty", "Presence penalty", -2, 2, 0.1],
  ["frequency_penalty", "Frequency penalty", -2, 2, 0.1],
  ["seed", "Seed", 0, Number.MAX_SAFE_INTEGER, 1],
  ["max_tokens", "Max tokens", 1, 1000000, 1],
  ["stop", "Stop sequence"],
];
const THEMES = ["system", "light", "dark"];
let methods = [];

function theme(next) {
  const now = document.documentElement.dataset.theme ?? "system";
  const name = next ? THEMES[(THEMES.indexOf(now) + 1) % THEMES.length] : now;
  if (name === "system") {
    delete document.documentElement.dataset.theme;
    localStorage.removeItem("antefix.theme");
  } else {
    document.documentElement.dataset.theme = name;
    localStorage.setItem("antefix.theme", name);
  }
  $("theme-name").textContent = name;
  $("theme").setAttribute("aria-label", `Colour theme: ${name}`);
  live.restyle();
}

function view(name) {
  for (const each of ["chat", "live"]) {
    $(`${each}-view`).hidden = each !== name;
    $(`view-${each}`).setAttribute("aria-pressed", String(each === name));
  }
  document.body.dataset.view = name;
  live.update();
}

/** On a narrow screen the panels are drawers; one is open at a time. */
function drawer(name, open) {
  for (const [panel, button] of [["list", "toggle-list"], ["side", "toggle-side"]]) {
    const show = panel === name && open;
    $(`${panel}-panel`).classList.toggle("open", show);
    $(button).setAttribute("aria-expanded", String(show));
  }
}

function requestFields(c) {
  const fields = {};
  for (const [name] of SAMPLING) {
    const value = c.params[name];
    if (value !== undefined && value !== "") fields[name] = value;
  }
  if ($("model").value) fields.model = $("model").value;
  const method = $("method").value;
  // As on the command line: `NAME,knob=value,...`; what is left empty is the default.
  if (method) fields.method = [method, ...Object.entries(c.knobs?.[method] ?? {}).map(([knob, value]) => `${knob}=${value}`)].join(",");
  return fields;
}

function buildSampling() {
  $("sampling").append(...SAMPLING.map(([name, label, min, max, step]) => {
    const input = step === undefined
      ? h("input", { id: `s-${name}`, type: "text", spellcheck: "false" })
      : h("input", { id: `s-${name}`, type: "number", min, max, step, inputmode: "decimal" });
    input.addEventListener("change", () => {
      const c = store.current();
      if (input.value === "") delete c.params[name];
      else if (step === undefined) c.params[name] = input.value;
      else if (input.validity.rangeOverflow || input.validity.rangeUnderflow || !Number.isFinite(input.valueAsNumber)) {
        input.reportValidity();
        return;
      } else c.params[name] = Number.isInteger(step) ? Math.round(input.valueAsNumber) : input.valueAsNumber;
      store.save();
    });
    return h("div", {}, h("label", { for: `s-${name}` }, label), input);
  }));
  $("sampling-reset").addEventListener("click", () => {
    store.current().params = {};
    store.changed();
  });
}

/** Shows the current conversation's settings. */
function showSettings() {
  const c = store.current();
  for (const [name] of SAMPLING) {
    const input = $(`s-${name}`);
    if (document.activeElement !== input) input.value = c.params[name] ?? "";
  }
  if (document.activeElement !== $("system")) $("system").value = c.system;
  pick($("model"), c.model);
  pick($("method"), c.method);
  aboutMethod();
}

function pick(select, value) {
  if ([...select.options].some((option) => option.value === value)) select.value = value;
  else if (select.options.length) select.selectedIndex = 0;
}

/** What the chosen method does, and its settings. */
function aboutMethod() {
  const method = methods.find((m) => m.name === $("method").value);
  $("method-about").textContent = method?.summary ?? "";
  $("method-knobs").replaceChildren(...(method?.knobs ?? []).map((knob) => setting(method.name, knob)));
}

function setting(method, knob) {
  const id = `k-${knob.name}`;
  const input = h("input", { id, type: "text", spellcheck: "false", placeholder: `${knob.default}` || "none", "aria-describedby": `${id}-help` });
  input.value = store.current().knobs?.[method]?.[knob.name] ?? "";
  input.addEventListener("change", () => {
    const c = store.current();
    const own = ((c.knobs ??= {})[method] ??= {});
    // A comma would start the next setting.
    const value = input.value.trim().replaceAll(",", "");
    if (value) own[knob.name] = value;
    else delete own[knob.name];
    store.save();
  });
  return h("div", {}, h("label", { for: id }, knob.name), input, h("p", { id: `${id}-help`, class: "hint" }, `${knob.help} (${knob.range})`));
}

async function connect() {
  const line = $("connection");
  try {
    const [models, known] = await Promise.all([api.models(), api.methods()]);
    methods = [{ name: "dense", summary: "Every key, every query: the model as it was trained.", knobs: [] }, ...known.filter((m) => m.axis !== "execution")];
    $("model").replaceChildren(...models.map((m) => h("option", { value: m.id },
      m.context_length ? `${m.id} (${m.context_length.toLocaleString("en")} tokens)` : m.id)));
    $("method").replaceChildren(...methods.map((m) => h("option", { value: m.name }, m.name)));
    line.textContent = "Connected.";
    line.classList.remove("error");
    showSettings();
  } catch (error) {
    line.textContent = error.message;
    line.classList.add("error");
    if (error.status === 401) askForKey();
  }
}

function askForKey() {
  $("key-section").open = true;
  drawer("side", true);
  $("key").focus();
}

function focusComposer() {
  drawer(null, false);
  view("chat");
  $("composer").focus();
}

theme(false);
buildSampling();
chat.start(requestFields);
live.start(chat.ownRequests);
store.onChange(showSettings);

$("theme").addEventListener("click", () => theme(true));
$("view-chat").addEventListener("click", () => view("chat"));
$("view-live").addEventListener("click", () => view("live"));
$("toggle-list").addEventListener("click", () => drawer("list", !$("list-panel").classList.contains("open")));
$("toggle-side").addEventListener("click", () => drawer("side", !$("side-panel").classList.contains("open")));
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") drawer(null, false);
});
document.addEventListener("antefix:key", askForKey);
document.addEventListener("antefix:opened", focusComposer);
$("new-chat").addEventListener("click", () => {
  store.create();
  store.changed();
  focusComposer();
});
$("clear-all").addEventListener("click", () => {
  if (!confirm("Delete all conversations in this browser?")) return;
  chat.stopAll();
  store.clear();
  store.changed();
  focusComposer();
});
$("system").addEventListener("input", () => {
  store.current().system = $("system").value;
  store.save();
});
$("model").addEventListener("change", () => {
  store.current().model = $("model").value;
  store.save();
});
$("method").addEventListener("change", () => {
  store.current().method = $("method").value;
  aboutMethod();
  store.save();
});
$("key").value = api.getKey();
$("key-form").addEventListener("submit", (event) => event.preventDefault());
$("key").addEventListener("change", () => {
  api.setKey($("key").value.trim());
  connect();
});

view("chat");
store.changed();
connect();
$("composer").focus();
