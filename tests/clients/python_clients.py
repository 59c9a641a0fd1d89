#!/usr/bin/env python3
"""The Python packages `openai` and `anthropic` against a live server: what they send is understood, what they read is right.

    pip install openai anthropic
    antefix serve --model smollm2 --port 8123 &
    python3 tests/clients/python_clients.py http://127.0.0.1:8123 [KEY]

Prints one line a check; exit code 1 when one fails.
"""

import asyncio, json, math, sys, traceback

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
    import urllib.request

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


WEATHER = {
    "type": "object", "required": ["city", "unit"], "additionalProperties": False,
    "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"enum": ["C", "F"]}},
}
PARIS = [{"role": "user", "content": "What is the weather in Paris?"}]


@check
def tools_are_called_and_answered():
    tool = {"type": "function", "function": {"name": "weather", "description": "The weather", "parameters": WEATHER}}
    ask = dict(model=MODEL, max_tokens=80, temperature=0, tools=[tool], tool_choice="required")
    whole = oa.chat.completions.create(messages=PARIS, **ask)
    call = whole.choices[0].message.tool_calls[0]
    assert whole.choices[0].finish_reason == "tool_calls" and call.function.name == "weather"
    assert json.loads(call.function.arguments)["unit"] in "CF"
    with oa.chat.completions.stream(messages=PARIS, **ask) as stream:
        stream.until_done()
        assert stream.get_final_completion().choices[0].message.tool_calls[0].function.name == "weather"
    result = {"role": "tool", "tool_call_id": call.id, "content": "17 degrees"}
    ask = ask | {"tool_choice": "none"}
    answer = oa.chat.completions.create(messages=[*PARIS, whole.choices[0].message, result], **ask)
    assert answer.choices[0].message.content and not answer.choices[0].message.tool_calls


@check
def json_schema():
    format = {"type": "json_schema", "json_schema": {"name": "w", "strict": True, "schema": WEATHER}}
    text = oa.chat.completions.create(**hello(80, response_format=format)).choices[0].message.content
    assert set(json.loads(text)) == {"city", "unit"}


@check
def embeddings():
    # The package asks for base64 by default and unpacks it.
    texts = ["The cat sat on the mat.", "A cat is sitting on a rug.", "Interest rates rose by two percent."]
    whole = oa.embeddings.create(model=MODEL, input=texts)
    floats = oa.embeddings.create(model=MODEL, input=texts, encoding_format="float")
    a, b, c = ([x for x in d.embedding] for d in whole.data)
    assert all(math.isclose(x, y, abs_tol=1e-6) for x, y in zip(a, floats.data[0].embedding))
    dot = lambda x, y: sum(p * q for p, q in zip(x, y))
    assert math.isclose(dot(a, a), 1, abs_tol=1e-4) and dot(a, b) > dot(a, c), (dot(a, b), dot(a, c))
    assert whole.usage.prompt_tokens > 10


@check
def responses():
    first = oa.responses.create(model=MODEL, input="My name is Ada.", instructions="Be brief.", max_output_tokens=16, temperature=0)
    assert first.output_text and first.usage.input_tokens > 0
    second = oa.responses.create(model=MODEL, input="Hello?", previous_response_id=first.id, max_output_tokens=8, temperature=0)
    assert second.usage.input_tokens > first.usage.input_tokens and second.previous_response_id == first.id
    assert oa.responses.retrieve(first.id).output_text == first.output_text
    with oa.responses.stream(model=MODEL, input="My name is Ada.", instructions="Be brief.", max_output_tokens=16, temperature=0) as stream:
        said = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
        # The package hands out the last response of a stream that was completed; this one may be cut.
    assert said == first.output_text
    format = {"format": {"type": "json_schema", "name": "w", "strict": True, "schema": WEATHER}}
    shaped = oa.responses.create(model=MODEL, input="Weather as JSON", text=format, max_output_tokens=80)
    assert json.loads(shaped.output_text)["unit"] in "CF"
    tool = {"type": "function", "name": "weather", "parameters": WEATHER, "strict": True}
    called = oa.responses.create(model=MODEL, input="Weather in Paris?", tools=[tool], tool_choice="required", max_output_tokens=80)
    assert called.output[0].type == "function_call" and json.loads(called.output[0].arguments)["unit"] in "CF"
    oa.responses.delete(first.id)
    try:
        oa.responses.retrieve(first.id)
    except openai.NotFoundError:
        pass
    else:
        raise AssertionError("it was deleted")


@check
def anthropic_tools():
    tool = {"name": "weather", "description": "The weather", "input_schema": WEATHER}
    ask = dict(model=MODEL, max_tokens=80, tools=[tool])
    made = an.messages.create(messages=PARIS, tool_choice={"type": "any"}, **ask)
    block = made.content[0]
    assert made.stop_reason == "tool_use" and block.name == "weather" and block.input["unit"] in "CF"
    with an.messages.stream(messages=PARIS, tool_choice={"type": "tool", "name": "weather"}, **ask) as stream:
        assert stream.get_final_message().content[0].input["unit"] in "CF"
    turn = [*PARIS, {"role": "assistant", "content": [block.model_dump()]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": block.id, "content": "17 degrees"}]}]
    assert an.messages.create(messages=turn, tool_choice={"type": "none"}, **ask).stop_reason != "tool_use"


@check
def langchain():
    from langchain_openai import ChatOpenAI, OpenAIEmbeddings

    chat = ChatOpenAI(base_url=BASE + "/v1", api_key=KEY, model=MODEL, temperature=0, max_tokens=80)
    assert chat.invoke("Say hello.").content
    assert "".join(part.content for part in chat.stream("Say hello.")) == chat.invoke("Say hello.").content
    shaped = chat.with_structured_output({"title": "weather", "description": "The weather", **WEATHER}, method="json_schema")
    assert shaped.invoke("The weather in Paris.")["unit"] in "CF"
    vectors = OpenAIEmbeddings(base_url=BASE + "/v1", api_key=KEY, model=MODEL, check_embedding_ctx_length=False)
    assert len(vectors.embed_documents(["one", "two"])) == 2


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
