// Conversations in localStorage. A conversation is a tree of messages; what is on screen is the path from the
// root to `leaf`. Edit, regenerate and fork all add a sibling; nothing is overwritten.

const KEY = "antefix.conversations";
const state = load();
const listeners = new Set();

function load() {
  try {
    const saved = JSON.parse(localStorage.getItem(KEY));
    if (saved && Array.isArray(saved.list) && saved.list.every(isConversation)) return saved;
  } catch {
    // Damaged: start anew below.
  }
  return { list: [], current: null };
}

function isConversation(c) {
  return typeof c?.id === "string" && typeof c.nodes === "object" && c.nodes !== null
    && Object.values(c.nodes).every((n) => typeof n.content === "string" && (n.parent === null || n.parent in c.nodes))
    && (c.leaf === null || c.leaf in c.nodes);
}

// crypto.randomUUID exists only on https and localhost.
const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(8)), (b) => b.toString(16).padStart(2, "0")).join("");

export const onChange = (listener) => listeners.add(listener);

/** Writes all conversations. Returns false if the browser's storage is full. */
export function save() {
  try {
    localStorage.setItem(KEY, JSON.stringify(state));
    return true;
  } catch {
    return false;
  }
}

export function changed() {
  const saved = save();
  for (const listener of listeners) listener(saved);
}

export const conversations = () => state.list;

export function current() {
  return state.list.find((c) => c.id === state.current) ?? create();
}

export function create() {
  // An empty conversation is used again instead of collecting more of them.
  let c = state.list.find((c) => Object.keys(c.nodes).length === 0);
  if (!c) {
    c = { id: newId(), title: "New conversation", system: "", params: {}, model: "", method: "", knobs: {}, nodes: {}, leaf: null };
    const like = state.list.find((c) => c.id === state.current);
    if (like) Object.assign(c, { system: like.system, params: { ...like.params }, knobs: structuredClone(like.knobs ?? {}), model: like.model, method: like.method });
    state.list.unshift(c);
  }
  state.current = c.id;
  return c;
}

export function open(id) {
  state.current = id;
}

export function remove(id) {
  state.list = state.list.filter((c) => c.id !== id);
}

export function clear() {
  state.list = [];
  state.current = null;
}

export function add(c, parent, role, content) {
  const node = { id: newId(), parent, role, content, at: Date.now() };
  c.nodes[node.id] = node;
  c.leaf = node.id;
  if (role === "user" && parent === null) c.title = content.trim().replace(/\s+/g, " ").slice(0, 60) || "New conversation";
  return node;
}

/** Messages from the root to `id`, both included. */
export function path(c, id = c.leaf) {
  const out = [];
  for (let node = c.nodes[id]; node && out.length < 100000; node = c.nodes[node.parent]) out.push(node);
  return out.reverse();
}

/** Children of `id` (null: the roots), oldest first. */
export const children = (c, id) => Object.values(c.nodes).filter((node) => node.parent === id).sort((a, b) => a.at - b.at);

/** The newest leaf below `id`. */
export function newest(c, id) {
  for (;;) {
    const next = children(c, id).at(-1);
    if (!next) return id;
    id = next.id;
  }
}
