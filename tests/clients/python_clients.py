#!/usr/bin/env python3
"""The Python packages `openai` and `anthropic` against a live server: what they send is understood, what they read is right.

    pip install openai anthropic
    antefix serve --model smollm2 --port 8123 &
    python3 tests/clients/python_clients.py http://127.0.0.1:8123 [KEY]

Prints one line a check; exit code 1 when one fails.
"""

import asyncio, sys, traceback

import anthropic, openai

BASE = sys.argv[1].rstrip("/")
KEY = sys.argv[2] if len(sys.argv) > 2 else "none"
oa = openai.OpenAI(base_url=BASE + "/v1", api_key=KEY, max_retries=0)
an = anthropic.Anthropic(base_url=BASE, api_key=KEY, max_retries=0)
MODEL = oa.models.list().data[0].id
CHECKS = []


def check(f):
    CHECKS.append(f)
    return f


def hello(length=24, **more):
    say = [{"role": "user", "content": "Say hello in French."}]
    return dict(model=MODEL, messages=say, max_tokens=length, temperature=0, **more)


@check
def models():
    one = oa.models.retrieve(MODEL)
    assert one.id == MODEL and one.object == "model"


@check
def chat_whole_and_streamed_agree():
    whole = oa.chat.completions.create(**hello())
    text, usage = "", None
    for chunk in oa.chat.completions.create(**hello(), stream=True, stream_options={"include_usage": True}):
        if chunk.choices:
            text += chunk.choices[0].delta.content or ""
        usage = chunk.usage or usage
    assert text == whole.choices[0].message.content and text
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens > 0


@check
def chat_n_logprobs_seed():
    ask = hello(8, n=3, seed=5, logprobs=True, top_logprobs=3)
    ask["temperature"] = 1.0
    a, b = oa.chat.completions.create(**ask), oa.chat.completions.create(**ask)
    assert [c.message.content for c in a.choices] == [c.message.content for c in b.choices]
    for c in a.choices:
        for t in c.logprobs.content:
            assert t.logprob <= 0 and len(t.top_logprobs) == 3 and bytes(t.bytes).decode(errors="replace") == t.token


@check
def chat_stop_and_bias():
    first = oa.chat.completions.create(**hello(1, logprobs=True, top_logprobs=2)).choices[0].logprobs.content[0]
    stopped = oa.chat.completions.create(**hello(24, stop=["a", "e"]))
    assert stopped.choices[0].finish_reason == "stop" and not set("ae") & set(stopped.choices[0].message.content)
    import json, urllib.request

    body = json.dumps({"content": first.token, "add_special": False}).encode()
    headers = {"content-type": "application/json", "authorization": "Bearer " + KEY}
    ids = json.load(urllib.request.urlopen(urllib.request.Request(BASE + "/tokenize", body, headers)))["tokens"]
    other = oa.chat.completions.create(**hello(1, logit_bias={str(ids[0]): -100}, logprobs=True))
    assert other.choices[0].logprobs.content[0].token != first.token


@check
def chat_parts_and_developer():
    r = oa.chat.completions.create(
        model=MODEL,
        max_tokens=4,
        messages=[
            {"role": "developer", "content": "Be short."},
            {"role": "user", "content": [{"type": "text", "text": "One "}, {"type": "text", "text": "word."}]},
        ],
    )
    assert r.choices[0].message.role == "assistant"


@check
def legacy_completions():
    r = oa.completions.create(model=MODEL, prompt=["The capital of France is", "1 2 3"], max_tokens=5, temperature=0, logprobs=2)
    assert len(r.choices) == 2 and len(r.choices[0].logprobs.token_logprobs) == 5
    assert "Paris" in r.choices[0].text, r.choices[0].text
    echoed = oa.completions.create(model=MODEL, prompt="The capital of France is Paris", max_tokens=0, echo=True, logprobs=0)
    assert echoed.choices[0].text.strip() == "The capital of France is Paris"
    assert echoed.choices[0].logprobs.token_logprobs[0] is None
    streamed = "".join(c.choices[0].text for c in oa.completions.create(model=MODEL, prompt="1 2 3", max_tokens=5, temperature=0, stream=True) if c.choices)
    assert streamed == r.choices[1].text


@check
def errors():
    for call, kind in [
        (lambda: oa.chat.completions.create(**{**hello(), "model": "nobody"}), openai.NotFoundError),
        (lambda: oa.chat.completions.create(**hello(top_p=3)), openai.BadRequestError),
        (lambda: oa.chat.completions.create(**{**hello(), "messages": []}), openai.BadRequestError),
        (lambda: an.messages.create(model=MODEL, max_tokens=0, messages=[{"role": "user", "content": "x"}]), anthropic.BadRequestError),
        (lambda: an.messages.create(model="nobody", max_tokens=1, messages=[{"role": "user", "content": "x"}]), anthropic.NotFoundError),
    ]:
        try:
            call()
        except kind as e:
            assert e.body
        else:
            raise AssertionError(f"no {kind.__name__}")


@check
def anthropic_cache_control():
    system = [{"type": "text", "text": "You know many facts. " * 60, "cache_control": {"type": "ephemeral"}}]
    say = [{"role": "user", "content": "Which?"}]
    # Newer versions of the package have no `temperature` of their own.
    ask = dict(model=MODEL, max_tokens=12, system=system, messages=say, extra_body={"temperature": 0})
    cold, warm = an.messages.create(**ask), an.messages.create(**ask)
    assert cold.usage.cache_creation_input_tokens > 200 and warm.usage.cache_read_input_tokens > 200
    total = lambda u: u.input_tokens + u.cache_creation_input_tokens + u.cache_read_input_tokens
    assert total(cold.usage) == total(warm.usage)
    assert cold.content[0].text == warm.content[0].text
    count = an.messages.count_tokens(model=MODEL, system=system, messages=ask["messages"])
    assert count.input_tokens == total(cold.usage)
    with an.messages.stream(**ask) as stream:
        text = "".join(stream.text_stream)
        last = stream.get_final_message()
    assert text == cold.content[0].text and last.stop_reason == cold.stop_reason


@check
def many_at_once():
    client = openai.AsyncOpenAI(base_url=BASE + "/v1", api_key=KEY, max_retries=3)

    async def all_():
        ask = lambda i: client.chat.completions.create(
            model=MODEL, max_tokens=8, temperature=0, messages=[{"role": "user", "content": f"Count from {i % 4}."}]
        )
        return await asyncio.gather(*(ask(i) for i in range(24)))

    texts = [r.choices[0].message.content for r in asyncio.run(all_())]
    assert all(texts[i] == texts[i % 4] for i in range(24))


failed = 0
for f in CHECKS:
    try:
        f()
        print("ok    ", f.__name__)
    except Exception:
        failed += 1
        print("FAILED", f.__name__)
        traceback.print_exc()
sys.exit(1 if failed else 0)
