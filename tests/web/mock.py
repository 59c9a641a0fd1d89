"""A server with the routes that the page uses and made-up answers, for tests of the page.

    python3 tests/web/mock.py [PORT]

Serves crates/server/web with the Content-Security-Policy of the real server. Its prompt cache is a real radix tree
over words (a "token" is a word), so that forks share nodes as they would in antefix.
"""

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

WEB = Path(__file__).resolve().parents[2] / "crates/server/web"
TYPES = {".html": "text/html; charset=utf-8", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
WORD_BYTES = 23_040
ANSWER = """A **prefix tree** keeps each stretch of text once:

1. the system prompt,
2. then every branch.

```rust
fn shared(nodes: &[Node]) -> u64 {
    nodes.iter().map(|n| n.bytes * n.requests.saturating_sub(1)).sum() // a line that is longer than a phone is wide
}
```

| level | tokens |
|---|---|
| system | 128 |
| turn | 32 |

So a fork costs only its own tokens."""


class State:
    """What the mock remembers: the tree, the steps, the counters."""

    def __init__(self, delay=0.02, key=""):
        self.delay, self.key = delay, key
        self.lock = threading.Lock()
        self.next_id = 1
        self.root = {"words": [], "children": [], "requests": set(), "seen": time.time(), "id": 0}
        self.running = {}
        self.prompt = self.cached = self.answered = 0
        self.steps = []
        self.bodies = []
        self.served = 0

    def insert(self, words, request):
        """Walks down as far as the tree agrees, adds the rest; returns how many words were there already."""
        node, at, found = self.root, 0, 0
        while at < len(words):
            child = next((c for c in node["children"] if c["words"][0] == words[at]), None)
            if child is None:
                child = self.node(words[at:])
                node["children"].append(child)
                at = len(words)
            else:
                same = 0
                while same < min(len(child["words"]), len(words) - at) and child["words"][same] == words[at + same]:
                    same += 1
                found += same
                at += same
                if same < len(child["words"]):
                    tail = self.node(child["words"][same:])
                    tail["children"], tail["requests"] = child["children"], set(child["requests"])
                    child["words"], child["children"] = child["words"][:same], [tail]
            child["requests"].add(request)
            child["seen"] = time.time()
            node = child
        return found

    def node(self, words):
        self.next_id += 1
        return {"words": words, "children": [], "requests": set(), "seen": time.time(), "id": self.next_id}

    def tree(self):
        out = []

        def walk(node, parent):
            for child in node["children"]:
                # Merge a run without branches, as the server does.
                words, requests, last = list(child["words"]), child["requests"] & self.running.keys(), child
                while len(last["children"]) == 1 and last["children"][0]["requests"] & self.running.keys() == requests:
                    last = last["children"][0]
                    words += last["words"]
                out.append({
                    "id": child["id"], "parent": parent, "tokens": len(words), "bytes": len(words) * WORD_BYTES,
                    "text": " ".join(words)[:80], "requests": sorted(requests), "tier": "ram",
                    "idle_s": round(time.time() - last["seen"], 1),
                })
                walk(last, child["id"])

        with self.lock:
            walk(self.root, None)
        return {"block_tokens": 32, "bytes_used": sum(n["bytes"] for n in out), "bytes_capacity": 1 << 30, "nodes": out}

    def loads(self):
        with self.lock:
            ms = sorted(s["ms"] for s in self.steps[-600:]) or [0]
            return {
                "running": len(self.running), "waiting": 0,
                "kv_bytes_used": (self.prompt + self.answered) * WORD_BYTES, "kv_bytes_capacity": 1 << 30,
                "prompt_tokens_total": self.prompt, "cached_tokens_total": self.cached,
                "completion_tokens_total": self.answered, "steps": self.steps[-600:],
                "ttft_ms": {"p50": 42.0, "p99": 130.0}, "itl_ms": {"p50": ms[len(ms) // 2], "p99": ms[-1]},
            }


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def send(self, status, body, kind="application/json"):
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", "default-src 'self'")
        self.end_headers()
        self.wfile.write(body)

    def refused(self):
        key = self.server.state.key
        if not key or self.headers.get("Authorization") == f"Bearer {key}":
            return False
        self.send(401, {"error": {"message": "A key is needed.", "type": "auth", "param": None, "code": "invalid_api_key"}})
        return True

    def do_GET(self):
        state, path = self.server.state, self.path.split("?")[0]
        if not path.startswith("/v1/"):
            file = (WEB / ("index.html" if path == "/" else path.lstrip("/"))).resolve()
            if file.is_relative_to(WEB) and file.is_file():
                return self.send(200, file.read_bytes(), TYPES.get(file.suffix, "text/plain"))
            return self.send(404, {"error": {"message": "Not found.", "type": "not_found", "param": None, "code": None}})
        if self.refused():
            return None
        if path == "/v1/models":
            return self.send(200, {"object": "list", "data": [
                {"id": "mock", "object": "model", "created": 0, "owned_by": "antefix", "context_length": 8192}]})
        if path == "/v1/methods":
            return self.send(200, {"methods": [
                {"name": "jrt", "axis": "context", "summary": "Documents are read twice.", "exact": True, "knobs": [
                    {"name": "times", "default": 2, "range": "1 to 4", "help": "How often the documents are written"}]}]})
        if path == "/v1/cache/tree":
            return self.send(200, state.tree())
        if path == "/v1/loads":
            return self.send(200, state.loads())
        return self.send(404, {"error": {"message": "Not found.", "type": "not_found", "param": None, "code": None}})

    def do_POST(self):
        state = self.server.state
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.refused():
            return
        if self.path != "/v1/chat/completions":
            self.send(404, {"error": {"message": "Not found.", "type": "not_found", "param": None, "code": None}})
            return
        body = json.loads(body)
        prompt = " ".join(f"<{m['role']}> {m['content']}" for m in body["messages"]).split()
        with state.lock:
            state.served += 1
            served = state.served
            state.bodies.append(body)
            request = f"chatcmpl-{served:06}"
            state.running[request] = True
            cached = state.insert(prompt, request)
            state.prompt += len(prompt)
            state.cached += cached
            self.step(len(prompt) - cached)
        try:
            self.stream(request, body, prompt, cached, served)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            with state.lock:
                del state.running[request]

    def step(self, prompt_rows):
        state = self.server.state
        rows = max(0, len(state.running) - (1 if prompt_rows else 0))
        state.steps.append({"t_ms": int(time.time() * 1000), "ms": 8 + 0.2 * prompt_rows + 1.5 * rows,
                            "prompt_rows": prompt_rows, "decode_rows": rows})
        del state.steps[:-600]

    def stream(self, request, body, prompt, cached, served):
        state = self.server.state
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        base = {"id": request, "object": "chat.completion.chunk", "created": 0, "model": "mock"}

        def event(**fields):
            self.wfile.write(f"data: {json.dumps(base | fields)}\n\n".encode())
            self.wfile.flush()

        pieces = (f"Answer {served}. " + ANSWER).split(" ")
        if "long" in body["messages"][-1]["content"]:
            pieces = pieces * 50
        pieces = pieces[: body.get("max_tokens", len(pieces))]
        for i, piece in enumerate(pieces):
            with state.lock:
                state.answered += 1
                self.step(0)
            event(choices=[{"index": 0, "delta": {"content": piece + (" " if i + 1 < len(pieces) else "")},
                            "finish_reason": None}])
            time.sleep(state.delay)
        with state.lock:
            state.insert(prompt + ["<assistant>", *" ".join(pieces).split()], request)
        event(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}])
        event(choices=[], usage={
            "prompt_tokens": len(prompt), "completion_tokens": len(pieces), "total_tokens": len(prompt) + len(pieces),
            "prompt_tokens_details": {"cached_tokens": cached}})
        self.wfile.write(b"data: [DONE]\n\n")


def serve(port=0, **options):
    """Starts the mock on a thread of its own; returns (server, base URL)."""
    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    server.state = State(**options)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}"


if __name__ == "__main__":
    print(serve(int(sys.argv[1]) if len(sys.argv) > 1 else 8090)[1], flush=True)
    threading.Event().wait()
