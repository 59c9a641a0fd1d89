"""The page in headless Chromium, against the mock or, with ANTEFIX_URL, against a live server.

    pip install -r tests/web/requirements.txt        # and a chromium: apt-get install chromium
    python3 tests/web/test_page.py [NAME ...]        # only the tests whose name contains NAME

ANTEFIX_URL=http://127.0.0.1:8080  a live server (tests that need the mock's answers are left out, and said so)
ANTEFIX_KEY=...                    its API key
CHROMIUM=/usr/bin/chromium         the browser
SCREENSHOTS=docs/img               also writes chat.png, tree.png and phone.png there
"""

import inspect
import os
import re
import shutil
import sys
import time
import traceback
from pathlib import Path
from urllib.parse import urlparse

from playwright.sync_api import expect, sync_playwright

sys.path.insert(0, str(Path(__file__).parent))
import mock  # noqa: E402

LIVE = os.environ.get("ANTEFIX_URL", "").rstrip("/")
KEY = os.environ.get("ANTEFIX_KEY", "")
SCREENSHOTS = os.environ.get("SCREENSHOTS", "")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
# A small model on a busy machine.
WAIT_MS = 120_000 if LIVE else 15_000
SHORT, LONG = "Say hello in one short sentence.", "Write a long story about a lighthouse, at least 2000 words."


class Page:
    """A fresh browser context on the page; collects what no test may see: console errors, foreign requests."""

    def __init__(self, browser, base, key=KEY, **context):
        self.base, self.errors, self.foreign = base, [], []
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **context})
        if key:
            self.context.add_init_script(f"sessionStorage.setItem('antefix.key', {key!r})")
        self.page = self.context.new_page()
        self.page.set_default_timeout(WAIT_MS)
        self.page.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
        self.page.on("pageerror", lambda e: self.errors.append(str(e)))
        self.page.on("request", self.watch)
        self.page.goto(base + "/")
        if key or not self.expects_401():
            expect(self.page.locator("#connection")).to_have_text("Connected.", timeout=WAIT_MS)

    def expects_401(self):
        return getattr(self, "wants_key", False)

    def watch(self, request):
        if urlparse(request.url).scheme in ("http", "https") and not request.url.startswith(self.base + "/"):
            self.foreign.append(request.url)

    def limit(self, tokens):
        self.page.get_by_label("Max tokens").fill(str(tokens))
        self.page.get_by_label("Max tokens").blur()

    def never_end(self):
        """Answers go on until they are stopped: what a model samples may end early, and the test with it."""
        self.page.route("**/v1/chat/completions", lambda r: r.continue_(
            post_data={**r.request.post_data_json, "ignore_eos": True}))

    def send(self, text):
        self.page.get_by_label("Message", exact=True).fill(text)
        self.page.keyboard.press("Enter")

    def answers(self):
        return self.page.locator(".message.assistant")

    def done(self, n):
        """Waits until `n` answers are on screen and none is being written."""
        expect(self.answers()).to_have_count(n, timeout=WAIT_MS)
        expect(self.page.locator(".message[aria-busy]")).to_have_count(0, timeout=WAIT_MS)

    def ask(self, text, n=1):
        self.send(text)
        self.done(n)

    def wide(self):
        """How many pixels the document or a main part is wider than the window."""
        return self.page.evaluate("""() => Math.max(
            document.documentElement.scrollWidth - innerWidth,
            ...['header', '#messages', '#chat-view', '#live-view', '#composer-form'].map((s) => {
              const e = document.querySelector(s);
              return e.offsetParent ? Math.max(e.scrollWidth - e.clientWidth, e.getBoundingClientRect().right - innerWidth) : 0;
            }))""")

    def close(self):
        self.context.close()
        assert not self.errors, f"console: {self.errors}"
        assert not self.foreign, f"requests to others: {self.foreign}"


def shot(p, name):
    """Writes a picture for the documentation, small enough for a repository."""
    path = Path(SCREENSHOTS) / f"{name}.png"
    if name != "phone":
        p.page.set_viewport_size({"width": 1040, "height": 660})
        p.page.wait_for_timeout(1500)
    p.page.screenshot(path=path)
    assert path.stat().st_size <= 150_000, f"{path} has {path.stat().st_size} bytes"


def test_send_and_stream(p, **_):
    p.limit(200)
    p.never_end()
    p.page.evaluate("""() => {
        window.lengths = new Set();
        new MutationObserver(() => {
            const text = document.querySelector('.message.assistant .text');
            if (text?.textContent) window.lengths.add(text.textContent.length);
        }).observe(document.body, {childList: true, subtree: true, characterData: true});
    }""")
    p.ask(SHORT)
    assert len(p.answers().first.locator(".text").inner_text()) > 2
    grown = p.page.evaluate("window.lengths.size")
    assert grown >= 3, f"the answer came in {grown} pieces"
    figures = p.answers().first.locator(".figures").inner_text()
    assert re.search(r"\d+ prompt tokens, [\d,]+ cached", figures), figures
    assert p.page.locator("#announce").inner_text().strip(), "screen readers are told the answer"


def test_request_carries_settings(p, **_):
    p.limit(5)
    p.page.get_by_label("Temperature").fill("0.5")
    p.page.get_by_label("Seed").fill("7")
    p.page.get_by_label("System prompt").fill("Be brief.")
    with p.page.expect_request("**/v1/chat/completions") as sent:
        p.send(SHORT)
    body = sent.value.post_data_json
    p.done(1)
    assert body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": SHORT}], body
    assert (body["temperature"], body["seed"], body["max_tokens"]) == (0.5, 7, 5), body
    assert body["stream"] is True and body["stream_options"] == {"include_usage": True} and body["model"] and body["method"], body
    assert "top_p" not in body, "fields left empty are not sent"


def test_methods_come_from_the_server_with_their_settings(p, server):
    known = p.page.evaluate("""async () => (await (await fetch('/v1/methods', {headers: sessionStorage['antefix.key']
        ? {Authorization: `Bearer ${sessionStorage['antefix.key']}`} : {}})).json()).methods""")
    # What always runs is listed by the server and cannot be chosen.
    known = [m for m in known if m["axis"] != "execution"]
    assert p.page.locator("#method option").all_inner_texts() == ["dense", *[m["name"] for m in known]]
    for method in known:
        p.page.locator("#method").select_option(method["name"])
        expect(p.page.locator("#method-about")).to_have_text(method["summary"])
        for knob in method["knobs"]:
            expect(p.page.get_by_label(knob["name"], exact=True)).to_have_attribute("placeholder", re.compile(".+"))
    if not server:
        return "the rest needs the mock's method"
    p.page.locator("#method").select_option("jrt")
    p.page.get_by_label("times", exact=True).fill("3")
    p.page.get_by_label("times", exact=True).blur()
    p.page.reload()
    expect(p.page.locator("#connection")).to_have_text("Connected.")
    expect(p.page.get_by_label("times", exact=True)).to_have_value("3")
    with p.page.expect_request("**/v1/chat/completions") as sent:
        p.send(SHORT)
    assert sent.value.post_data_json["method"] == "jrt,times=3"
    p.done(1)


def test_the_api_is_documented(p, server, base, **_):
    if server:
        return "needs a live server"
    p.page.goto(base + "/docs")
    route = p.page.locator("summary", has_text="/v1/chat/completions")
    expect(route).to_be_visible()
    route.click()
    expect(p.page.locator(".operation[open] code", has_text="temperature").first).to_be_visible()
    p.page.set_viewport_size({"width": 360, "height": 720})
    assert p.page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    return None


def test_stop_by_escape_and_by_button(p, **_):
    p.never_end()
    for n, stop in enumerate([lambda: p.page.keyboard.press("Escape"), lambda: p.page.locator("#stop").click()], 1):
        p.send(LONG)
        expect(p.answers()).to_have_count(n, timeout=WAIT_MS)
        expect(p.answers().last.locator(".text")).not_to_be_empty(timeout=WAIT_MS)
        stop()
        p.done(n)
        expect(p.answers().last.locator(".figures")).to_contain_text("stopped")
        expect(p.page.locator("#composer")).to_be_focused()
    settled = time.time() + 10
    while time.time() < settled and running(p):
        time.sleep(0.2)
    assert running(p) == 0, "the server goes on after a stop"


def running(p):
    return p.page.evaluate("""async () => (await (await fetch('/v1/loads', {headers: sessionStorage['antefix.key']
        ? {Authorization: `Bearer ${sessionStorage['antefix.key']}`} : {}})).json()).running""")


def test_regenerate_keeps_the_old_answer(p, server):
    p.limit(8)
    p.ask(SHORT)
    first = p.answers().first.locator(".text").inner_text()
    p.answers().first.get_by_role("button", name="Regenerate").click()
    expect(p.answers().first.locator(".siblings")).to_contain_text("2/2", timeout=WAIT_MS)
    p.done(1)
    if server:
        assert p.answers().first.locator(".text").inner_text() != first
    p.answers().first.get_by_role("button", name="Previous version").click()
    expect(p.answers().first.locator(".siblings")).to_contain_text("1/2")
    assert p.answers().first.locator(".text").inner_text() == first


def test_edit_starts_a_branch(p, **_):
    p.limit(5)
    p.ask("My old question")
    p.page.locator(".message.user").get_by_role("button", name="Edit").click()
    expect(p.page.locator("#composer")).to_have_value("My old question")
    p.page.keyboard.press("Escape")
    expect(p.page.locator("#composer")).to_have_value("")
    p.page.locator(".message.user").get_by_role("button", name="Edit").click()
    p.ask("My new question")
    expect(p.page.locator(".message.user .text")).to_have_text(["My new question"])
    expect(p.page.locator("#branches")).to_contain_text("My old question")


def test_fork_shows_branches_and_shares_the_prefix(p, **_):
    p.limit(12)
    p.page.get_by_label("System prompt").fill("You are a patient assistant. " * 40)
    p.ask("First question", 1)
    p.ask("Left branch", 2)
    p.answers().first.get_by_role("button", name="Fork").click()
    p.done(1)
    expect(p.page.locator("#branches .pending")).to_have_count(1)
    expect(p.page.locator("#composer")).to_be_focused()
    p.ask("Right branch", 2)
    expect(p.page.locator("#branches .pending")).to_have_count(0)
    expect(p.page.locator("#branches .branch")).to_have_count(2)
    cached = int(re.search(r"([\d,]+) cached", p.answers().last.locator(".figures").inner_text())[1].replace(",", ""))
    assert cached >= 32, f"{cached} tokens came from the cache"
    p.page.locator("#branches").get_by_role("button", name="Q Left branch").click()
    expect(p.page.locator(".message.user .text")).to_have_text(["First question", "Left branch"])
    p.page.reload()
    expect(p.page.locator(".message.user .text")).to_have_text(["First question", "Left branch"])


HOSTILE = """<img src=x onerror="window.pwned=1"> <script>window.pwned=2</script>

[click](javascript:window.pwned=3) [data](data:text/html,<script>window.pwned=4</script>) [tab](java\tscript:window.pwned=5)
![picture](https://example.com/track.png) <https://example.com/a"onmouseover="window.pwned=6>

[fine](https://example.com/"onclick="window.pwned=7) <svg/onload=window.pwned=8> <iframe src="javascript:window.pwned=9"></iframe>

```html" onclick="window.pwned=10
<img src=x onerror=window.pwned=11>
```

| a | <b onclick=window.pwned=12>x</b> |
|---|---|
| <style>*{display:none}</style> | `<i>` |"""


def test_markdown_never_becomes_markup(p, **_):
    import json
    chunks = [{"id": "chatcmpl-x", "choices": [{"index": 0, "delta": {"content": HOSTILE[i:i + 9]}}]} for i in range(0, len(HOSTILE), 9)]
    body = "".join(f"data: {json.dumps(c)}\n\n" for c in chunks) + "data: [DONE]\n\n"
    p.page.route("**/v1/chat/completions", lambda r: r.fulfill(status=200, content_type="text/event-stream", body=body))
    p.ask("Attack")
    answer = p.answers().first
    expect(answer.locator(".text")).to_contain_text("onerror")
    found = answer.locator(".text").evaluate("""(root) => {
        const allowed = new Set('P,A,CODE,PRE,FIGURE,FIGCAPTION,SPAN,BUTTON,DIV,TABLE,THEAD,TBODY,TR,TH,TD'.split(','));
        const attributes = new Set('href,target,rel,class,tabindex,role,aria-label,type'.split(','));
        return [...root.querySelectorAll('*')].flatMap((e) => [
            ...(allowed.has(e.tagName) ? [] : [e.tagName]),
            ...[...e.attributes].filter((a) => !attributes.has(a.name)).map((a) => `${e.tagName} ${a.name}`),
            ...(e.tagName === 'A' && !/^(https?:|mailto:)/.test(e.href) ? [e.href] : []),
        ]);
    }""")
    assert not found, found
    for link in answer.locator(".text a").all():
        assert link.get_attribute("rel") == "noopener noreferrer"
    answer.locator("figcaption").click()
    assert p.page.evaluate("window.pwned") is None


def test_markdown_renders(p, **_):
    html = p.page.evaluate("""async () => {
        const { render } = await import('/markdown.js');
        const html = (text) => { const d = document.createElement('div'); d.append(render(text)); return d.innerHTML; };
        const begun = performance.now();
        for (const text of ['*'.repeat(20000), '['.repeat(20000), '> '.repeat(5000), '`'.repeat(20001), '_a'.repeat(10000),
                            '- '.repeat(5000), '**a '.repeat(5000), '|'.repeat(20000), '  '.repeat(9) + '- a\\n'.repeat(3000)]) render(text);
        return { ms: performance.now() - begun, cases: [
            '# One', 'a **b** *c* `d` ~~e~~ snake_case_name 2*3*4', '- a\\n- b\\n  - c', '3. a\\n4. b', '> q', '```js\\nlet a;',
            'a\\n\\n---\\n\\nb', '[x](https://example.com/a_(b))', '- a\\n\\n  ```\\n  code\\n  ```\\n- b', '1. a\\n\\n2. b', 'https://example.com/x.'].map(html) };
    }""")
    want = [
        "<h3>One</h3>",
        "<p>a <strong>b</strong> <em>c</em> <code>d</code> <del>e</del> snake_case_name 2*3*4</p>",
        "<ul><li>a</li><li>b<ul><li>c</li></ul></li></ul>",
        '<ol start="3"><li>a</li><li>b</li></ol>',
        "<blockquote><p>q</p></blockquote>",
        "<code>let a;</code>",
        "<p>a</p><hr><p>b</p>",
        '<p><a href="https://example.com/a_(b)" target="_blank" rel="noopener noreferrer">x</a></p>',
        "<code>code</code></pre></figure></li><li>b</li></ul>",
        "<ol><li>a</li><li>b</li></ol>",
        'href="https://example.com/x"',
    ]
    for got, part in zip(html["cases"], want, strict=True):
        assert part in got, f"{part!r} is not in {got!r}"
    assert html["ms"] < 5000, f"hostile texts took {html['ms']:.0f} ms"


def test_code_is_copied(p, server):
    if not server:
        return "needs the mock's answer"
    p.context.grant_permissions(["clipboard-read", "clipboard-write"])
    p.ask("Show code")
    p.answers().first.get_by_role("button", name="Copy code").click()
    assert "fn shared" in p.page.evaluate("navigator.clipboard.readText()")


def test_keyboard_only(p, **_):
    p.limit(5)
    p.page.reload()
    expect(p.page.locator("#connection")).to_have_text("Connected.")
    expect(p.page.locator("#composer")).to_be_focused()
    p.page.keyboard.type("one")
    p.page.keyboard.press("Shift+Enter")
    p.page.keyboard.type("two")
    p.page.keyboard.press("Enter")
    p.done(1)
    assert p.page.locator(".message.user .text").inner_text() == "one\ntwo"

    def to(name, key="Tab"):
        for _ in range(60):
            p.page.keyboard.press(key)
            e = p.page.evaluate("""() => { const e = document.activeElement; const s = getComputedStyle(e);
                return [e.getAttribute('aria-label') ?? e.textContent, s.outlineStyle !== 'none' && parseFloat(s.outlineWidth) >= 1]; }""")
            if e[0] == name:
                assert e[1], f"the focus on {name} cannot be seen"
                return
        raise AssertionError(f"{name} is not reached by {key}")

    to("Regenerate", "Shift+Tab")
    p.page.keyboard.press("Enter")
    expect(p.answers().first.locator(".siblings")).to_contain_text("2/2", timeout=WAIT_MS)
    p.done(1)
    to("Live", "Shift+Tab")
    p.page.keyboard.press("Space")
    expect(p.page.locator("#live-view")).to_be_visible()
    to("Chat", "Shift+Tab")
    p.page.keyboard.press("Space")
    expect(p.page.locator("#chat-view")).to_be_visible()


def test_everything_has_a_name(p, **_):
    p.limit(5)
    p.ask(SHORT)
    nameless = p.page.evaluate("""() => [...document.querySelectorAll('button, input, select, textarea, summary')]
        .filter((e) => !(e.getAttribute('aria-label') || e.textContent.trim() && e.tagName !== 'SELECT' || e.labels?.length))
        .map((e) => e.outerHTML)""")
    assert not nameless, nameless
    ids = p.page.evaluate("[...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(ids) == len(set(ids)), "an id is used twice"


CONTRAST = """() => {
    const rgb = (c) => c.match(/[\\d.]+/g).map(Number);
    const light = ([r, g, b]) => [r, g, b].map((v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((s, v, i) => s + v * [0.2126, 0.7152, 0.0722][i], 0);
    const bad = [];
    for (const e of document.querySelectorAll('body *')) {
        if (!e.checkVisibility() || e.disabled || e.tagName === 'OPTION') continue;
        if (![...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim())) continue;
        let b = e;
        while (b && rgb(getComputedStyle(b).backgroundColor)[3] === 0) b = b.parentElement;
        const [x, y] = [light(rgb(getComputedStyle(e).color)), light(rgb(getComputedStyle(b ?? document.body).backgroundColor))].sort((a, b) => b - a);
        if ((x + 0.05) / (y + 0.05) < 4.5) bad.push(`${e.tagName} ${e.className} ${e.textContent.slice(0, 20)} ${((x + 0.05) / (y + 0.05)).toFixed(2)}`);
    }
    return [getComputedStyle(document.body).backgroundColor, bad];
}"""


def test_dark_and_light(p, browser, base, **_):
    p.limit(40)
    p.ask(SHORT)
    seen = {}
    for scheme in ("light", "dark"):
        p.page.emulate_media(color_scheme=scheme)
        seen[scheme], bad = p.page.evaluate(CONTRAST)
        assert not bad, f"{scheme}: contrast below 4.5: {bad}"
    assert seen["light"] != seen["dark"]
    p.page.get_by_role("button", name="Colour theme").click()
    expect(p.page.locator("html")).to_have_attribute("data-theme", "light")
    assert p.page.evaluate(CONTRAST)[0] == seen["light"], "the switch is stronger than the system"
    p.page.reload()
    assert p.page.evaluate(CONTRAST)[0] == seen["light"], "the switch is remembered"
    p.page.get_by_role("button", name="Colour theme").click()
    p.page.emulate_media(color_scheme="light")
    assert p.page.evaluate(CONTRAST)[0] == seen["dark"]


def test_phone_width(p, **_):
    p.page.set_viewport_size({"width": 360, "height": 720})
    p.page.get_by_role("button", name="Settings").click()
    p.limit(120)
    assert p.wide() <= 0, p.wide()
    p.page.keyboard.press("Escape")
    expect(p.page.get_by_label("Max tokens")).to_be_hidden()
    p.ask("Explain a prefix tree, with code and a table.")
    if SCREENSHOTS:
        shot(p, "phone")
    p.ask("A" * 300, 2)
    assert p.wide() <= 0, p.wide()
    p.page.get_by_role("button", name="Chats").click()
    expect(p.page.get_by_role("button", name="New", exact=True)).to_be_visible()
    assert p.wide() <= 0, p.wide()
    p.page.keyboard.press("Escape")
    p.page.get_by_role("button", name="Live").click()
    expect(p.page.locator("#tree .node").first).to_be_visible(timeout=WAIT_MS)
    expect(p.page.locator("#plot-batch canvas")).to_be_visible()
    assert p.wide() <= 0, p.wide()


def test_live_view(p, browser, base, server):
    """Two conversations behind one system prompt run at once: the tree shows what they share."""
    system = "You are the librarian of a small town. " * 60
    others = [Page(browser, base) for _ in range(2)]
    for each in (p, *others):
        each.page.get_by_label("System prompt").fill(system)
    p.limit(4)
    p.ask(SHORT)
    for i, each in enumerate(others):
        each.never_end()
        each.send(f"{LONG} Reader {i}.")
        expect(each.answers().locator(".text")).not_to_be_empty(timeout=WAIT_MS)
    p.page.get_by_role("button", name="Live").click()
    expect(p.page.locator("#tree .saved").first).to_contain_text("saves", timeout=WAIT_MS)
    expect(p.page.locator("#tiles")).to_contain_text("Saved by sharing")
    for plot in ("batch", "speed", "steps", "latency"):
        expect(p.page.locator(f"#plot-{plot} canvas")).to_be_visible()
        painted = p.page.locator(f"#plot-{plot} canvas").evaluate(
            "(c) => new Set(new Uint32Array(c.getContext('2d').getImageData(0, 0, c.width, c.height).data.buffer)).size")
        assert painted > 3, f"{plot} is empty"
    if SCREENSHOTS:
        time.sleep(3)
        shot(p, "tree")
    for each in others:
        each.page.keyboard.press("Escape")
        each.done(1)
        each.close()


def test_live_asks_only_while_visible(p, **_):
    asked = []
    p.page.on("request", lambda r: asked.append(r.url) if "/v1/loads" in r.url else None)
    p.page.wait_for_timeout(1500)
    assert not asked, "the chat view does not ask"
    p.page.get_by_role("button", name="Live").click()
    p.page.wait_for_timeout(3500)
    n = len(asked)
    assert (2 if LIVE else 3) <= n <= 5, f"{n} times in 3.5 s"
    p.page.get_by_role("button", name="Chat", exact=True).click()
    p.page.wait_for_timeout(2200)
    assert len(asked) <= n + 1, "it went on asking"


def test_errors_are_shown(p, **_):
    p.page.route("**/v1/chat/completions", lambda r: r.fulfill(status=429, headers={"Retry-After": "3"}, json={
        "error": {"message": "<b>Too many</b> requests.", "type": "rate_limit", "param": None, "code": None}}))
    p.ask(SHORT)
    expect(p.answers().locator(".error")).to_have_text("<b>Too many</b> requests. Try again in 3 s.")
    p.page.unroute("**/v1/chat/completions")
    p.page.route("**/v1/chat/completions", lambda r: r.fulfill(
        status=200, content_type="text/event-stream", body='data: {"choices":[{"delta":{"content":"half"}}]}\n\n'))
    p.answers().get_by_role("button", name="Regenerate").click()
    expect(p.answers().locator(".error")).to_have_text("The connection broke off.")
    expect(p.answers().locator(".text")).to_have_text("half")
    p.errors[:] = [e for e in p.errors if "429" not in e]


def test_conversations_are_kept_and_cleared(p, **_):
    p.limit(3)
    p.ask("Remember the lighthouse")
    p.page.get_by_role("button", name="New", exact=True).click()
    p.done(0)
    p.ask("Another matter")
    p.page.reload()
    expect(p.page.locator("#conversations .entry")).to_have_text(["Another matter", "Remember the lighthouse"])
    p.page.locator("#conversations").get_by_role("button", name="Remember the lighthouse", exact=True).click()
    expect(p.page.locator(".message.user .text")).to_have_text(["Remember the lighthouse"])
    p.page.on("dialog", lambda d: d.accept())
    p.page.get_by_role("button", name="Delete all").click()
    p.done(0)
    assert "lighthouse" not in p.page.evaluate("localStorage['antefix.conversations']")


def test_key_is_asked_for(browser, server, **_):
    if not server:
        return "needs a mock with a key"
    locked, base = mock.serve(key="secret-key")
    p = Page.__new__(Page)
    p.wants_key = True
    p.__init__(browser, base, key="")
    expect(p.page.locator("#connection")).to_contain_text("A key is needed.")
    expect(p.page.locator("#key")).to_be_focused()
    p.page.keyboard.type("secret-key")
    p.page.keyboard.press("Enter")
    expect(p.page.locator("#connection")).to_have_text("Connected.")
    p.ask(SHORT)
    assert p.page.evaluate("[sessionStorage['antefix.key'], JSON.stringify(localStorage).includes('secret-key')]") == ["secret-key", False]
    p.errors[:] = [e for e in p.errors if "401" not in e]
    p.close()
    locked.shutdown()


def test_screenshot_of_chat(p, **_):
    if not SCREENSHOTS:
        return "SCREENSHOTS is not set"
    p.page.get_by_label("System prompt").fill("You are a patient assistant who explains with short examples.")
    p.limit(90)
    p.ask("How does a prefix tree save memory?", 1)
    p.ask("Show it in Rust.", 2)
    p.answers().first.get_by_role("button", name="Fork").click()
    p.ask("And what does a fork cost?", 2)
    p.page.evaluate("document.querySelector('#messages').scrollTop = 1e9")
    shot(p, "chat")
    return None


def main():
    if not CHROMIUM:
        sys.exit("no chromium found: apt-get install chromium, or set CHROMIUM")
    tests = [(n, f) for n, f in globals().items() if n.startswith("test_") and (not sys.argv[1:] or any(a in n for a in sys.argv[1:]))]
    server, base = (None, LIVE) if LIVE else mock.serve()
    if SCREENSHOTS:
        Path(SCREENSHOTS).mkdir(parents=True, exist_ok=True)
    failed = 0
    with sync_playwright() as playwright:
        # Chromium's sandbox does not start as root, as CI containers run it; the page under test is our own.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--disable-lcd-text", *(["--no-sandbox"] if os.geteuid() == 0 else [])])
        for name, test in tests:
            p = None
            try:
                wants = inspect.signature(test).parameters
                given = {"browser": browser, "base": base, "server": server}
                if "p" in wants:
                    p = given["p"] = Page(browser, base)
                if not any(w.kind == w.VAR_KEYWORD for w in wants.values()):
                    given = {k: v for k, v in given.items() if k in wants}
                skipped = test(**given)
                if p:
                    p.close()
                print(f"{'left out' if skipped else 'ok':8} {name}{': ' + skipped if skipped else ''}", flush=True)
            except Exception:
                failed += 1
                print(f"FAILED   {name}\n{traceback.format_exc()}", flush=True)
                if p:
                    p.context.close()
        browser.close()
    if failed:
        sys.exit(f"{failed} of {len(tests)} failed")
    print(f"{len(tests)} tests, {'live server' if LIVE else 'mock'}")


if __name__ == "__main__":
    main()
