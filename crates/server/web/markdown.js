// Markdown to DOM nodes. Builds every element itself and puts the model's text into text nodes only,
// so nothing that a model writes can become markup. Raw HTML is shown as text; images become links.
import { copyButton, h } from "./dom.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*\s*$/;
const RULE = /^ {0,3}([-*_])\s*(?:\1\s*){2,}$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])(\s+|$)(.*)$/;
const QUOTE = /^ {0,3}>\s?(.*)$/;
const TABLE_RULE = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;
// Deeper nesting than this is rendered flat: a model may write ten thousand `>`.
const MAX_DEPTH = 12;

export function render(text) {
  const root = document.createDocumentFragment();
  root.append(...blocks(text.replaceAll("\r\n", "\n").split("\n"), 0));
  return root;
}

/** The address if it may be followed: http, https or mailto, absolute. Everything else is shown as text. */
export function safeUrl(address) {
  try {
    const url = new URL(address.trim());
    return ["http:", "https:", "mailto:"].includes(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
}

function blocks(lines, depth) {
  const out = [];
  let i = 0;
  while (i < lines.length) {
    const line = lines[i];
    if (!line.trim()) {
      i += 1;
      continue;
    }
    let match;
    if ((match = FENCE.exec(line))) {
      const body = [];
      const close = match[1];
      for (i += 1; i < lines.length; i += 1) {
        const end = /^ {0,3}(`{3,}|~{3,})\s*$/.exec(lines[i]);
        if (end && end[1][0] === close[0] && end[1].length >= close.length) break;
        body.push(lines[i]);
      }
      i += 1;
      out.push(codeBlock(body.join("\n"), match[2].trim().split(/\s+/)[0]));
    } else if ((match = HEADING.exec(line))) {
      // The page has h1 and h2 of its own.
      out.push(h(`h${Math.min(match[1].length + 2, 6)}`, {}, inline(match[2], 0)));
      i += 1;
    } else if (RULE.test(line)) {
      out.push(h("hr"));
      i += 1;
    } else if (QUOTE.test(line) && depth < MAX_DEPTH) {
      const body = [];
      for (; i < lines.length && (match = QUOTE.exec(lines[i])); i += 1) body.push(match[1]);
      out.push(h("blockquote", {}, blocks(body, depth + 1)));
    } else if (ITEM.test(line) && depth < MAX_DEPTH) {
      const end = listEnd(lines, i);
      out.push(list(lines.slice(i, end), depth));
      i = end;
    } else if (line.includes("|") && i + 1 < lines.length && lines[i + 1].includes("|") && TABLE_RULE.test(lines[i + 1])) {
      const rows = [cells(line)];
      for (i += 2; i < lines.length && lines[i].includes("|"); i += 1) rows.push(cells(lines[i]));
      out.push(table(rows));
    } else {
      const body = [line];
      for (i += 1; i < lines.length && lines[i].trim() && !starts(lines[i]); i += 1) body.push(lines[i]);
      out.push(h("p", {}, inline(body.join("\n"), 0)));
    }
  }
  return out;
}

const starts = (line) => FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || ITEM.test(line);

/** One past the last line of the list that starts at `from`. */
function listEnd(lines, from) {
  const [, indent, mark] = ITEM.exec(lines[from]);
  const ordered = /\d/.test(mark);
  let fence = null;
  let i = from + 1;
  for (; i < lines.length; i += 1) {
    const line = lines[i];
    const deeper = line.startsWith(" ".repeat(indent.length + 2));
    const mark = FENCE.exec(line.trim());
    if (fence || (mark && deeper)) {
      if (mark) fence = fence ? null : mark[1];
      continue;
    }
    if (!line.trim()) {
      const next = lines.slice(i + 1).find((line) => line.trim());
      const item = next && ITEM.exec(next);
      if (!next || !(next.startsWith(" ".repeat(indent.length + 2)) || (item && /\d/.test(item[2]) === ordered))) break;
    } else if (!deeper) {
      const item = ITEM.exec(line);
      if (item ? /\d/.test(item[2]) !== ordered : starts(line)) break;
    }
  }
  return i;
}

function list(lines, depth) {
  const [, indent, mark] = ITEM.exec(lines[0]);
  const ordered = /\d/.test(mark);
  const items = [];
  let width = 0;
  for (const line of lines) {
    const item = ITEM.exec(line);
    if (item && item[1].length < indent.length + 2) {
      width = item[1].length + item[2].length + Math.min(item[3].length || 1, 4);
      items.push([item[4]]);
    } else {
      const strip = Math.min(width, line.length - line.trimStart().length);
      items.at(-1).push(line.slice(strip));
    }
  }
  const start = ordered ? Number.parseInt(mark, 10) : 1;
  return h(ordered ? "ol" : "ul", { start: ordered && start !== 1 ? start : null }, items.map((body) => {
    const nodes = blocks(body, depth + 1);
    // A one-paragraph item needs no paragraph's margins.
    if (nodes[0]?.tagName === "P") nodes.splice(0, 1, ...nodes[0].childNodes);
    return h("li", {}, nodes);
  }));
}

const cells = (line) => line.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));

function table([head, ...rows]) {
  const row = (tag, list) => h("tr", {}, head.map((_, i) => h(tag, {}, inline(list[i] ?? "", 0))));
  return h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Table" },
    h("table", {}, h("thead", {}, row("th", head)), h("tbody", {}, rows.map((list) => row("td", list)))));
}

function codeBlock(text, language) {
  return h("figure", { class: "code" },
    h("figcaption", {}, h("span", {}, language || "text"), copyButton(() => text, "Copy code")),
    h("pre", { tabindex: "0", role: "region", "aria-label": "Code" }, h("code", {}, text)));
}

// Alternatives in order of precedence; each is bounded to one construct, so the search stays linear in practice.
const INLINE = new RegExp([
  /(?<esc>\\[\\`*_{}[\]()#+\-.!|~<>])/,
  /(?<ticks>`+)(?<code>[^`]|[^`][^]*?[^`])\k<ticks>(?!`)/,
  /!?\[(?<label>[^\]\n]{0,500})\]\((?<href>[^()\s]{0,2000}(?:\([^()\s]{0,500}\)[^()\s]{0,500})?)(?:\s+"[^"\n]{0,200}")?\)/,
  /<(?<auto>(?:https?:\/\/|mailto:)[^\s<>]{1,2000})>/,
  /(?<bare>https?:\/\/[^\s<>()\]`*"']{1,2000}[^\s<>()\]`*"'.,:;!?])/,
  /(?<strong>\*\*|__)(?=\S)(?<bold>[^]{0,2000}?\S)\k<strong>/,
  /(?<em>\*|(?<!\w)_)(?=[^\s*_])(?<italic>[^*\n]{0,1000}?[^\s*])\k<em>(?!\w)/,
  /~~(?=\S)(?<del>[^\n]{0,1000}?\S)~~/,
  /(?<br> {2,}\n)/,
].map((part) => part.source).join("|"), "g");

function inline(text, depth) {
  if (depth > MAX_DEPTH) return [text];
  const out = [];
  let at = 0;
  for (const match of text.matchAll(INLINE)) {
    if (match.index > at) out.push(text.slice(at, match.index));
    at = match.index + match[0].length;
    const g = match.groups;
    if (g.esc) out.push(g.esc[1]);
    else if (g.code !== undefined) out.push(h("code", {}, g.code.replace(/^ (.*) $/s, "$1")));
    else if (g.href !== undefined) out.push(...link(g.href, inline(g.label || g.href, depth + 1), match[0]));
    else if (g.auto) out.push(...link(g.auto, [g.auto], match[0]));
    else if (g.bare) out.push(...link(g.bare, [g.bare], match[0]));
    else if (g.bold !== undefined) out.push(h("strong", {}, inline(g.bold, depth + 1)));
    else if (g.italic !== undefined) out.push(h("em", {}, inline(g.italic, depth + 1)));
    else if (g.del !== undefined) out.push(h("del", {}, inline(g.del, depth + 1)));
    else out.push(h("br"));
  }
  if (at < text.length) out.push(text.slice(at));
  return out;
}

function link(address, label, source) {
  const href = safeUrl(address);
  return href ? [h("a", { href, target: "_blank", rel: "noopener noreferrer" }, label)] : [source];
}
