// The npm packages `openai` and `@anthropic-ai/sdk` against a live server: node node_clients.mjs BASE [KEY]
// Prints one line a check; exit code 1 when one fails. Run it where both packages are installed.
import assert from "node:assert/strict";

import Anthropic from "@anthropic-ai/sdk";
import OpenAI from "openai";

const [base, key = "none"] = process.argv.slice(2);
const oa = new OpenAI({ baseURL: `${base}/v1`, apiKey: key, maxRetries: 0 });
const an = new Anthropic({ baseURL: base, apiKey: key, maxRetries: 0 });
const model = (await oa.models.list()).data[0].id;
const say = [{ role: "user", content: "Say hello in French." }];
const weather = {
  type: "object", required: ["city", "unit"], additionalProperties: false,
  properties: { city: { type: "string", maxLength: 20 }, unit: { enum: ["C", "F"] } },
};

const checks = {
  async "chat, whole and streamed"() {
    const ask = { model, messages: say, max_tokens: 24, temperature: 0 };
    const whole = await oa.chat.completions.create(ask);
    let text = "";
    let usage = null;
    for await (const chunk of await oa.chat.completions.create({ ...ask, stream: true, stream_options: { include_usage: true } })) {
      text += chunk.choices[0]?.delta.content ?? "";
      usage = chunk.usage ?? usage;
    }
    assert.equal(text, whole.choices[0].message.content);
    assert.equal(usage.completion_tokens, whole.usage.completion_tokens);
  },
  async "tools"() {
    const tools = [{ type: "function", function: { name: "weather", parameters: weather } }];
    const made = await oa.chat.completions.create({ model, messages: say, max_tokens: 80, tools, tool_choice: "required" });
    const call = made.choices[0].message.tool_calls[0];
    assert.equal(call.function.name, "weather");
    assert.ok("CF".includes(JSON.parse(call.function.arguments).unit));
  },
  async "JSON schema"() {
    const format = { type: "json_schema", json_schema: { name: "w", strict: true, schema: weather } };
    const made = await oa.chat.completions.create({ model, messages: say, max_tokens: 80, response_format: format });
    assert.deepEqual(Object.keys(JSON.parse(made.choices[0].message.content)).sort(), ["city", "unit"]);
  },
  async "embeddings"() {
    const made = await oa.embeddings.create({ model, input: ["one", "two"] });
    assert.equal(made.data.length, 2);
    const length = made.data[0].embedding.reduce((sum, x) => sum + x * x, 0);
    assert.ok(Math.abs(length - 1) < 1e-4, `${length}`);
  },
  async "responses"() {
    const first = await oa.responses.create({ model, input: "Hello", max_output_tokens: 8, temperature: 0 });
    assert.ok(first.output_text);
    let said = "";
    for await (const event of await oa.responses.create({ model, input: "Hello", max_output_tokens: 8, temperature: 0, stream: true })) {
      if (event.type === "response.output_text.delta") said += event.delta;
    }
    assert.equal(said, first.output_text);
  },
  async "errors"() {
    await assert.rejects(oa.chat.completions.create({ model: "nobody", messages: say }), OpenAI.NotFoundError);
    await assert.rejects(oa.chat.completions.create({ model, messages: say, top_p: 3 }), OpenAI.BadRequestError);
    await assert.rejects(an.messages.create({ model, messages: [], max_tokens: 1 }), Anthropic.BadRequestError);
  },
  async "Anthropic: cache_control, whole and streamed"() {
    const system = [{ type: "text", text: "You know many things. ".repeat(60), cache_control: { type: "ephemeral", ttl: "1h" } }];
    const ask = { model, max_tokens: 8, system, messages: say };
    await an.messages.create(ask);
    const warm = await an.messages.create(ask);
    assert.ok(warm.usage.cache_read_input_tokens > 200, JSON.stringify(warm.usage));
    const last = await an.messages.stream(ask).finalMessage();
    assert.equal(last.usage.cache_read_input_tokens, warm.usage.cache_read_input_tokens);
    const counted = await an.messages.countTokens({ model, system, messages: say });
    const { input_tokens, cache_creation_input_tokens, cache_read_input_tokens } = warm.usage;
    assert.equal(counted.input_tokens, input_tokens + cache_creation_input_tokens + cache_read_input_tokens);
  },
  async "Anthropic: tools"() {
    const tools = [{ name: "weather", input_schema: weather }];
    const made = await an.messages.create({ model, max_tokens: 80, messages: say, tools, tool_choice: { type: "any" } });
    assert.equal(made.stop_reason, "tool_use");
    assert.ok("CF".includes(made.content[0].input.unit));
  },
};

let failed = 0;
for (const [name, check] of Object.entries(checks)) {
  try {
    await check();
    console.log(`ok     ${name}`);
  } catch (error) {
    failed += 1;
    console.log(`FAILED ${name}\n${error.stack}`);
  }
}
process.exit(failed ? 1 : 0);
