// The live view: prefix tree, batch timeline, speed and latency. Asks once a second while it can be seen.
import * as api from "./api.js";
import { $, bytes, count, h } from "./dom.js";

const PERIOD_MS = 1000;
const HISTORY = 300;
/** More nodes than this are counted, not drawn. */
const MAX_NODES = 400;

let timer = null;
let controller = null;
let own = new Set();
let plots = [];
/** Latency is only known as of now, so its past is what this page saw. */
const latency = [];

export function start(ownRequests) {
  own = ownRequests;
  document.addEventListener("visibilitychange", update);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", restyle);
  new ResizeObserver(() => {
    for (const plot of plots) plot.setSize(size(plot.root.parentElement));
  }).observe($("live-view"));
}

/** Starts or stops asking, by whether the view can be seen. */
export function update() {
  const visible = !$("live-view").hidden && document.visibilityState === "visible";
  if (visible && timer === null) {
    timer = setInterval(poll, PERIOD_MS);
    poll();
  } else if (!visible && timer !== null) {
    clearInterval(timer);
    timer = null;
    controller?.abort();
  }
}

/** Plots are drawn on canvas: a new theme means new plots. */
export function restyle() {
  for (const plot of plots) plot.destroy();
  plots = [];
}

async function poll() {
  // A slow server is asked again only when it has answered.
  if (controller) return;
  controller = new AbortController();
  try {
    const [loads, tree] = await Promise.all([api.loads(controller.signal), api.tree(controller.signal)]);
    latency.push({ t: Date.now() / 1000, ttft: loads.ttft_ms ?? {}, itl: loads.itl_ms ?? {} });
    if (latency.length > HISTORY) latency.shift();
    $("live-error").hidden = true;
    drawTiles(loads, tree);
    drawTree(tree);
    drawPlots(loads.steps ?? []);
  } catch (error) {
    if (error.name === "AbortError") return;
    $("live-error").textContent = error.message;
    $("live-error").hidden = false;
  } finally {
    controller = null;
  }
}

/** Bytes that would be needed besides if every running request held its own copy. */
export const saved = (nodes) => nodes.reduce((sum, n) => sum + n.bytes * Math.max(0, n.requests.length - 1), 0);

function drawTiles(loads, tree) {
  const share = loads.prompt_tokens_total ? `${(100 * loads.cached_tokens_total / loads.prompt_tokens_total).toFixed(1)} %` : "–";
  const ms = (value) => (Number.isFinite(value) ? `${value >= 100 ? value.toFixed(0) : value.toFixed(1)} ms` : "–");
  const tiles = [
    ["Running", count(loads.running)],
    ["Waiting", count(loads.waiting)],
    ["KV memory", `${bytes(loads.kv_bytes_used)} of ${bytes(loads.kv_bytes_capacity)}`],
    ["Saved by sharing", bytes(saved(tree.nodes))],
    ["Prompt tokens from cache", share],
    ["Tokens answered", count(loads.completion_tokens_total)],
    ["First token p50 / p99", `${ms(loads.ttft_ms?.p50)} / ${ms(loads.ttft_ms?.p99)}`],
    ["Between tokens p50 / p99", `${ms(loads.itl_ms?.p50)} / ${ms(loads.itl_ms?.p99)}`],
  ];
  $("tiles").replaceChildren(...tiles.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
}

/** A colour for a request, the same in every node it passes through. */
function hue(id) {
  let sum = 0;
  for (const c of id) sum = (sum * 31 + c.codePointAt(0)) % 9973;
  return `c${sum % 8}`;
}

function drawTree({ nodes, bytes_used, bytes_capacity, block_tokens }) {
  const shared = nodes.filter((n) => n.requests.length > 1).length;
  $("tree-summary").textContent = nodes.length
    ? `${count(nodes.length)} nodes in blocks of ${block_tokens} tokens, ${bytes(bytes_used)} of ${bytes(bytes_capacity)}; `
      + `${count(shared)} shared by running requests, ${bytes(saved(nodes))} saved`
    : "The cache is empty.";
  const ids = new Set(nodes.map((n) => n.id));
  const below = new Map();
  for (const node of nodes) {
    const parent = ids.has(node.parent) ? node.parent : null;
    if (!below.has(parent)) below.set(parent, []);
    below.get(parent).push(node);
  }
  for (const list of below.values()) list.sort((a, b) => b.requests.length - a.requests.length || a.idle_s - b.idle_s);
  const longest = Math.max(1, ...nodes.map((n) => n.tokens));
  let drawn = 0;
  const level = (parent, depth) => {
    const list = (below.get(parent) ?? []).slice(0, Math.max(0, MAX_NODES - drawn));
    if (!list.length || depth > 40) return null;
    drawn += list.length;
    return h("ul", {}, list.map((node) => h("li", {}, row(node, longest), level(node.id, depth + 1))));
  };
  const root = level(null, 0);
  const scroll = [$("tree").scrollTop, $("tree").scrollLeft];
  $("tree").replaceChildren(...(root ? [root] : []));
  if (drawn < nodes.length) $("tree").append(h("p", { class: "hint" }, `and ${count(nodes.length - drawn)} more`));
  [$("tree").scrollTop, $("tree").scrollLeft] = scroll;
}

function row(node, longest) {
  const bar = h("span", { class: "meter", "aria-hidden": "true" }, h("span", {}));
  bar.firstChild.style.width = `${Math.max(2, 100 * node.tokens / longest)}%`;
  const chips = node.requests.slice(0, 6).map((id) =>
    h("span", { class: `chip ${hue(id)}`, title: id }, own.has(id) ? "this page" : id.length <= 8 ? id : id.slice(-6)));
  if (node.requests.length > 6) chips.push(h("span", { class: "chip" }, `+${node.requests.length - 6}`));
  return h("div", { class: node.requests.length ? "node active" : "node" },
    bar,
    h("span", { class: "tokens" }, node.tokens === 1 ? "1 token" : `${count(node.tokens)} tokens`),
    h("span", { class: "size" }, bytes(node.bytes)),
    h("span", { class: `tier ${node.tier === "disk" ? "disk" : "ram"}` }, node.tier),
    h("span", { class: "sample", title: node.text }, node.text.replace(/\s+/g, " ").trim() || "…"),
    h("span", { class: "chips" }, chips.length ? chips : h("span", { class: "idle" }, `idle ${node.idle_s.toFixed(0)} s`)),
    node.requests.length > 1 ? h("span", { class: "saved" }, `saves ${bytes(node.bytes * (node.requests.length - 1))}`) : null);
}

const size = (box) => ({ width: Math.max(200, box.clientWidth), height: 180 });

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function makePlots() {
  const { uPlot } = window;
  const axis = { stroke: colour("--muted"), grid: { stroke: colour("--line"), width: 1 }, ticks: { show: false }, font: "11px system-ui", size: 44 };
  const line = (label, name, extra = {}) => ({ label, stroke: colour(name), width: 1.5, points: { show: false }, ...extra });
  const make = (id, { x, series, bars }) => new uPlot({
    ...size($(id)),
    scales: { x: { time: false }, y: { range: (u, lo, hi) => [0, hi > 0 ? hi * 1.1 : 1] } },
    axes: [{ ...axis, size: 30, values: (u, list) => list.map(x) }, axis],
    series: [{ label: id === "plot-speed" || id === "plot-latency" ? "time" : "step", value: (u, v) => (v === null ? "–" : x(v)) }, ...series],
    cursor: { drag: { x: false, y: false }, points: { show: !bars } },
    legend: { live: true },
  }, [[], ...series.map(() => [])], $(id));
  const bar = window.uPlot.paths.bars({ size: [0.9, 100], align: 1 });
  const ago = (s) => `${Math.round(s)} s`;
  return [
    make("plot-batch", { x: (n) => `${n}`, bars: true, series: [
      { ...line("prompt rows", "--series-1", { fill: colour("--series-1"), width: 0, paths: bar }),
        // Drawn is the sum, told is the part.
        value: (u, v, s, i) => (i === null || i === undefined ? "–" : `${u.data[1][i] - u.data[2][i]}`) },
      line("decode rows", "--series-2", { fill: colour("--series-2"), width: 0, paths: bar }),
    ] }),
    make("plot-speed", { x: ago, series: [line("prompt", "--series-1"), line("decode", "--series-2")] }),
    make("plot-steps", { x: (n) => `${n}`, series: [line("duration", "--series-3")] }),
    make("plot-latency", { x: ago, series: [
      line("first p50", "--series-1"), line("first p99", "--series-1", { dash: [4, 3] }),
      line("between p50", "--series-2"), line("between p99", "--series-2", { dash: [4, 3] }),
    ] }),
  ];
}

/** Prompt and decode rows per second over the last minute, by second. */
export function speed(steps, now, seconds = 60) {
  const prompt = new Array(seconds).fill(0);
  const decode = new Array(seconds).fill(0);
  for (const step of steps) {
    const age = Math.floor((now - step.t_ms) / 1000);
    if (age < 0 || age >= seconds) continue;
    prompt[seconds - 1 - age] += step.prompt_rows;
    decode[seconds - 1 - age] += step.decode_rows;
  }
  return [prompt.map((_, i) => i - seconds + 1), prompt, decode];
}

function drawPlots(steps) {
  if (!plots.length) plots = makePlots();
  const last = steps.slice(-240);
  const at = last.map((_, i) => i - last.length + 1);
  const now = Math.max(Date.now(), last.at(-1)?.t_ms ?? 0);
  plots[0].setData([at, last.map((s) => s.prompt_rows + s.decode_rows), last.map((s) => s.decode_rows)]);
  plots[1].setData(speed(steps, now));
  plots[2].setData([at, last.map((s) => s.ms)]);
  const known = (value) => value ?? null;
  plots[3].setData([
    latency.map((l) => l.t - latency.at(-1).t),
    latency.map((l) => known(l.ttft.p50)), latency.map((l) => known(l.ttft.p99)),
    latency.map((l) => known(l.itl.p50)), latency.map((l) => known(l.itl.p99)),
  ]);
}
