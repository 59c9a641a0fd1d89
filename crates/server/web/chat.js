// The conversation: messages, composer, branches.
import * as api from "./api.js";
import { $, copyButton, count, h } from "./dom.js";
import { render } from "./markdown.js";
import * as store from "./store.js";

/** Answers that are being written: message id -> {controller, conversation}. */
const running = new Map();
/** Ids that the server gave to this page's requests, for the live view. */
export const ownRequests = new Set();
/** Message being edited, or null. */
let editing = null;
/** Called before a request to ask for model, method and sampling fields. */
let settings = () => ({});

export function start(readSettings) {
  settings = readSettings;
  store.onChange(draw);
  $("composer-form").addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  $("stop").addEventListener("click", stop);
  $("composer").addEventListener("input", grow);
  $("composer").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      submit();
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || event.isComposing) return;
    if (answering()) stop();
    else if (editing) endEdit();
  });
  window.addEventListener("beforeunload", () => store.save());
}

const answering = () => [...running.values()].some((run) => run.conversation === store.current());

function grow() {
  const area = $("composer");
  area.style.height = "auto";
  area.style.height = `${Math.min(area.scrollHeight + 2, window.innerHeight * 0.4)}px`;
}

function submit() {
  const text = $("composer").value;
  if (!text.trim() || answering()) return;
  const c = store.current();
  const parent = editing ? c.nodes[editing].parent : c.leaf;
  $("composer").value = "";
  editing = null;
  grow();
  answer(c, store.add(c, parent, "user", text));
  $("messages").scrollTop = $("messages").scrollHeight;
}

function stop() {
  for (const run of running.values()) if (run.conversation === store.current()) run.controller.abort();
  $("composer").focus();
}

/** Stops everything, before conversations are deleted. */
export function stopAll() {
  for (const run of running.values()) run.controller.abort();
}

/** Asks for an answer to `question` and streams it into a new message. */
async function answer(c, question) {
  const history = store.path(c, question.id).map(({ role, content }) => ({ role, content }));
  if (c.system.trim()) history.unshift({ role: "system", content: c.system });
  const node = store.add(c, question.id, "assistant", "");
  const controller = new AbortController();
  running.set(node.id, { controller, conversation: c });
  store.changed();

  const begun = performance.now();
  let first = null;
  let said = 0;
  try {
    for await (const chunk of api.chat({ ...settings(c), messages: history }, controller.signal)) {
      if (chunk.id) ownRequests.add(chunk.id);
      if (chunk.usage) node.usage = chunk.usage;
      const choice = chunk.choices?.[0];
      if (choice?.finish_reason) node.finish = choice.finish_reason;
      const text = choice?.delta?.content;
      if (!text) continue;
      first ??= performance.now();
      node.content += text;
      drawSoon(node);
      said = announce(node.content, said);
    }
  } catch (error) {
    if (error.name === "AbortError") node.finish = "stopped";
    else node.error = error.message;
    if (error.status === 401) document.dispatchEvent(new CustomEvent("antefix:key"));
  } finally {
    running.delete(node.id);
  }
  const end = performance.now();
  node.time = { ttft: first === null ? null : first - begun, total: end - begun, decode: first === null ? null : end - first };
  announce(node.error ?? node.content, node.error ? 0 : said, true);
  store.changed();
}

/** Hands whole paragraphs to the screen reader; returns how much of the text it has been given. */
function announce(text, from, all = false) {
  const to = all ? text.length : text.lastIndexOf("\n\n");
  if (to <= from) return from;
  $("announce").textContent = text.slice(from, to);
  return to;
}

// Rendering a long answer again for every token would cost more than the tokens do.
let due = null;
function drawSoon(node) {
  due ??= setTimeout(() => {
    due = null;
    const body = document.querySelector(`[data-id="${node.id}"] .text`);
    if (!body) return;
    const log = $("messages");
    const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
    body.replaceChildren(render(node.content));
    if (atEnd) log.scrollTop = log.scrollHeight;
  }, 60);
}

function draw(saved) {
  const c = store.current();
  if (editing && !c.nodes[editing]) editing = null;
  const log = $("messages");
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  const focused = document.activeElement?.closest?.("[data-id]")?.dataset.id;
  const action = document.activeElement?.dataset?.action;
  const shown = store.path(c);
  log.replaceChildren(...shown.map((node) => message(c, node)));
  if (!shown.length) log.append(h("p", { class: "empty" }, "Ask something. Answers are computed on this server's CPU."));
  if (focused) log.querySelector(`[data-id="${focused}"] [data-action="${action}"]`)?.focus();
  if (atEnd) log.scrollTop = log.scrollHeight;
  $("stop").hidden = !answering();
  $("send").hidden = answering();
  note(c, saved);
  drawList();
  drawBranches(c);
}

function note(c, saved) {
  const line = $("composer-note");
  const last = c.nodes[c.leaf];
  if (saved === false) line.textContent = "The browser's storage is full: delete conversations to keep new ones.";
  else if (editing) line.replaceChildren("Editing: the new text starts a branch. ", action("Cancel", "cancel", endEdit));
  else if (last && store.children(c, last.id).length) line.textContent = "Your next message starts a new branch here.";
  else line.textContent = "";
  line.hidden = !line.textContent;
}

const action = (name, key, run, label) =>
  h("button", { class: "quiet", type: "button", onclick: run, "data-action": key, "aria-label": label }, name);

function message(c, node) {
  const user = node.role === "user";
  const busy = running.has(node.id);
  const body = h("div", { class: "text" });
  if (user) body.textContent = node.content;
  else body.append(render(node.content));
  const bar = [];
  const siblings = store.children(c, node.parent);
  if (siblings.length > 1) {
    const at = siblings.indexOf(node);
    const go = (to) => () => show(c, siblings[to].id);
    bar.push(h("span", { class: "siblings" },
      h("button", { class: "quiet", type: "button", disabled: at === 0, onclick: go(at - 1), "data-action": "previous", "aria-label": "Previous version" }, "‹"),
      `${at + 1}/${siblings.length}`,
      h("button", { class: "quiet", type: "button", disabled: at === siblings.length - 1, onclick: go(at + 1), "data-action": "next", "aria-label": "Next version" }, "›")));
  }
  if (!busy) {
    bar.push(copyButton(() => node.content, user ? "Copy message" : "Copy answer"));
    if (user) bar.push(action("Edit", "edit", () => edit(node)));
    else {
      bar.push(action("Regenerate", "regenerate", () => !answering() && answer(c, c.nodes[node.parent])));
      bar.push(action("Fork", "fork", () => fork(c, node), "Fork the conversation here"));
    }
  }
  return h("article", { class: user ? "message user" : "message assistant", "data-id": node.id, "aria-busy": busy ? "true" : null },
    h("h3", { class: "who" }, user ? "You" : "Answer"),
    body,
    node.error ? h("p", { class: "error", role: "alert" }, node.error) : null,
    h("div", { class: "bar" }, bar, h("span", { class: "figures" }, busy ? "" : figures(node))));
}

function figures(node) {
  const out = [];
  const u = node.usage;
  if (u) {
    const cached = u.prompt_tokens_details?.cached_tokens ?? 0;
    out.push(`${count(u.prompt_tokens)} prompt tokens, ${count(cached)} cached`, `${count(u.completion_tokens)} answered`);
    if (u.completion_tokens > 1 && node.time?.decode > 0) {
      out.push(`${((u.completion_tokens - 1) / node.time.decode * 1000).toFixed(1)} tokens/s`);
    }
  }
  if (node.time?.ttft) out.push(`first after ${(node.time.ttft / 1000).toFixed(2)} s`);
  if (node.finish === "stopped") out.push("stopped");
  if (node.finish === "length") out.push("cut at max tokens");
  return out.join(" · ");
}

function edit(node) {
  editing = node.id;
  $("composer").value = node.content;
  grow();
  store.changed();
  $("composer").focus();
}

function endEdit() {
  editing = null;
  $("composer").value = "";
  grow();
  store.changed();
  $("composer").focus();
}

/** The conversation ends at `node` now; what is written next becomes a branch beside what followed it. */
function fork(c, node) {
  editing = null;
  c.leaf = node.id;
  store.changed();
  $("composer").focus();
}

function show(c, id) {
  editing = null;
  c.leaf = store.newest(c, id);
  store.changed();
}

function drawList() {
  const now = store.current();
  $("conversations").replaceChildren(...store.conversations().map((c) => h("li", {},
    h("button", { class: "entry", type: "button", "aria-current": c === now ? "true" : null, onclick: () => {
      editing = null;
      store.open(c.id);
      store.changed();
      document.dispatchEvent(new CustomEvent("antefix:opened"));
    } }, c.title),
    h("button", { class: "quiet", type: "button", "aria-label": `Delete ${c.title}`, onclick: () => {
      for (const run of running.values()) if (run.conversation === c) run.controller.abort();
      store.remove(c.id);
      store.changed();
      document.dispatchEvent(new CustomEvent("antefix:opened"));
    } }, "×"))));
}

/** The tree of branches. A stretch without branches stays at one depth; each branch starts a list of its own. */
function drawBranches(c) {
  const onPath = new Set(store.path(c).map((node) => node.id));
  const run = (node) => {
    const items = [];
    for (;;) {
      items.push(branchEntry(c, node, onPath));
      const next = store.children(c, node.id);
      const pending = node.id === c.leaf && next.length > 0;
      if (next.length === 1 && !pending) {
        node = next[0];
        continue;
      }
      for (const child of next) items.push(h("li", {}, h("ul", { class: "branch" }, run(child))));
      if (pending) items.push(h("li", {}, h("ul", { class: "branch" }, h("li", { class: "pending" }, "new branch"))));
      return items;
    }
  };
  const roots = store.children(c, null);
  const items = roots.length === 1 ? run(roots[0]) : roots.map((root) => h("li", {}, h("ul", { class: "branch" }, run(root))));
  $("branches").replaceChildren(...items);
  if (!items.length) $("branches").append(h("li", { class: "hint" }, "No messages yet."));
}

function branchEntry(c, node, onPath) {
  const user = node.role === "user";
  const cached = node.usage?.prompt_tokens_details?.cached_tokens;
  return h("li", {}, h("button", {
    type: "button",
    class: `entry${onPath.has(node.id) ? " on-path" : ""}`,
    "aria-current": node.id === c.leaf ? "true" : null,
    onclick: () => show(c, node.id),
  },
  h("span", { class: "role" }, user ? "Q" : "A"),
  h("span", { class: "excerpt" }, node.content.trim().slice(0, 80) || (running.has(node.id) ? "writing" : "empty")),
  cached === undefined ? null : h("span", { class: "cached", title: "Prompt tokens that came from the cache" }, `${count(cached)}/${count(node.usage.prompt_tokens)}`)));
}
