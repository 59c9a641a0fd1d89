// The documentation of the API, drawn from /openapi.json.
import { $, h } from "./dom.js";

const MAX_DEPTH = 6;
const METHODS = ["get", "post", "put", "delete"];

/** The schema behind a `$ref`, and its name. */
function open(api, schema) {
  const name = schema?.$ref?.split("/").at(-1);
  return name ? [api.components.schemas[name] ?? {}, name] : [schema ?? {}, null];
}

/** A type in a few words: `string | null`, `list of integer`. */
function type(api, schema) {
  const [s, name] = open(api, schema);
  if (name) return name;
  const parts = s.oneOf ?? s.anyOf;
  if (parts) return parts.map((part) => type(api, part)).join(" | ");
  if (s.type === "array" || (Array.isArray(s.type) && s.type.includes("array"))) {
    const rest = Array.isArray(s.type) ? s.type.filter((t) => t !== "array") : [];
    return [`list of ${type(api, s.items)}`, ...rest].join(" | ");
  }
  if (s.enum) return s.enum.map((value) => JSON.stringify(value)).join(" | ");
  return [s.type ?? "any"].flat().join(" | ");
}

/** All properties, those of `allOf` included. */
function properties(api, schema) {
  const [s] = open(api, schema);
  const out = Object.entries(s.properties ?? {}).map(([name, value]) => ({ name, value, required: s.required?.includes(name) }));
  for (const part of s.allOf ?? []) out.push(...properties(api, part));
  return out;
}

/** The named schemas inside a type, to unfold. */
function inner(api, schema) {
  const [s, name] = open(api, schema);
  if (name) return properties(api, schema).length || s.description ? [schema] : (s.oneOf ?? s.anyOf ?? []).flatMap((part) => inner(api, part));
  return [...(s.oneOf ?? s.anyOf ?? []), ...(s.items ? [s.items] : [])].flatMap((part) => inner(api, part));
}

function fields(api, schema, depth = 0) {
  const list = properties(api, schema);
  if (!list.length || depth > MAX_DEPTH) return null;
  return h("dl", { class: "fields" }, list.map(({ name, value, required }) => h("div", {},
    h("dt", {}, h("code", {}, name), " ", h("span", { class: "hint" }, type(api, value), required ? ", required" : "")),
    h("dd", {}, value.description ?? open(api, value)[0].description ?? "",
      inner(api, value).map((part) => {
        const below = fields(api, part, depth + 1);
        return below && h("details", {}, h("summary", {}, open(api, part)[1]), below);
      })))));
}

function operation(api, path, method, op) {
  const body = op.requestBody?.content?.["application/json"]?.schema;
  const answer = Object.entries(op.responses ?? {}).filter(([status]) => status !== "default");
  return h("details", { class: "operation" },
    h("summary", {}, h("span", { class: "method" }, method.toUpperCase()), " ", h("code", {}, path), " ", h("span", { class: "hint" }, op.summary ?? "")),
    op.description ? h("p", {}, op.description) : null,
    (op.parameters ?? []).length ? h("h3", {}, "Parameters") : null,
    (op.parameters ?? []).map((p) => h("p", {}, h("code", {}, p.name), ` (${p.in}) `, p.description ?? "")),
    body ? h("h3", {}, "Request") : null,
    body ? fields(api, body) : null,
    h("h3", {}, "Answer"),
    answer.map(([status, response]) => h("div", {},
      h("p", {}, h("code", {}, status), " ", response.description ?? ""),
      Object.values(response.content ?? {}).map((c) => fields(api, c.schema)))));
}

async function start() {
  const api = await (await fetch("/openapi.json", { cache: "no-store" })).json();
  const groups = new Map((api.tags ?? []).map((tag) => [tag.name, { about: tag.description, list: [] }]));
  for (const [path, item] of Object.entries(api.paths)) {
    for (const method of METHODS.filter((m) => item[m])) {
      const tag = item[method].tags?.[0] ?? "more";
      if (!groups.has(tag)) groups.set(tag, { about: "", list: [] });
      groups.get(tag).list.push(operation(api, path, method, item[method]));
    }
  }
  $("docs").replaceChildren(
    h("p", { class: "hint" }, `${api.info.description} Version ${api.info.version}. Keys go into `, h("code", {}, "Authorization: Bearer KEY"), "."),
    ...[...groups].map(([name, { about, list }]) => h("section", {}, h("h2", {}, name), h("p", { class: "hint" }, about), list)));
  $("docs").removeAttribute("aria-busy");
}

start().catch((error) => $("docs").replaceChildren(h("p", { class: "error", role: "alert" }, error.message)));
