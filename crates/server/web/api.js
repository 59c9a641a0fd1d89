// Talks to the server this page came from, and to nothing else.

const KEY = "antefix.key";

export const getKey = () => sessionStorage.getItem(KEY) ?? "";
export const setKey = (key) => (key ? sessionStorage.setItem(KEY, key) : sessionStorage.removeItem(KEY));

/** What the server, or the way to it, had to say. `status` is 0 when there was no answer. */
export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function request(path, init = {}) {
  const headers = { ...init.headers };
  if (getKey()) headers.Authorization = `Bearer ${getKey()}`;
  let response;
  try {
    response = await fetch(path, { ...init, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server does not answer.");
  }
  if (!response.ok) {
    const body = await response.json().catch(() => null);
    let message = body?.error?.message ?? `The server answered ${response.status}.`;
    if (response.status === 401) message += " Enter an API key in the settings.";
    const wait = response.headers.get("Retry-After");
    if (wait) message += ` Try again in ${wait} s.`;
    throw new ApiError(response.status, message);
  }
  return response;
}

const get = async (path, signal) => (await request(path, { signal })).json();

export const models = async () => (await get("/v1/models")).data ?? [];
export const methods = async () => (await get("/v1/methods")).methods ?? [];
export const tree = (signal) => get("/v1/cache/tree", signal);
export const loads = (signal) => get("/v1/loads", signal);

/** Streams a chat completion: yields the parsed chunks in order. */
export async function* chat(body, signal) {
  const response = await request("/v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  let finished = false;
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") {
        finished = true;
        return;
      }
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(response.status, chunk.error.message ?? "The server reported an error.");
      yield chunk;
    }
  } catch (error) {
    if (error instanceof ApiError || error.name === "AbortError") throw error;
    throw new ApiError(0, "The connection broke off.");
  }
  if (!finished) throw new ApiError(0, "The connection broke off.");
}

/** The `data` of each server-sent event; lines may be cut anywhere. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      rest += value;
      const lines = rest.split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (data.length) yield data.join("\n");
          data = [];
        } else if (line.startsWith("data:")) {
          data.push(line.slice(line[5] === " " ? 6 : 5));
        }
      }
    }
    if (data.length) yield data.join("\n");
  } finally {
    reader.cancel().catch(() => {});
  }
}
