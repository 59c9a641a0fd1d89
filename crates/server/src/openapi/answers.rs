//! The shapes of the larger answers. They are only described here: `tests/described.rs` holds what is sent against them.
#![expect(dead_code, reason = "read by the derive, never built")]

use serde::Serialize;
use serde_json::Value;
use utoipa::ToSchema;

/// OpenAI's chat completion.
#[derive(Serialize, ToSchema)]
pub(crate) struct ChatCompletion {
    id: String,
    /// `chat.completion`
    object: String,
    created: u64,
    model: String,
    system_fingerprint: String,
    choices: Vec<ChatChoice>,
    usage: Usage,
}

/// One answer.
#[derive(Serialize, ToSchema)]
struct ChatChoice {
    index: usize,
    message: ChatAnswer,
    /// `content`: each token with its log-probability and the likeliest ones there.
    logprobs: Option<Value>,
    /// `stop`, `length` or `tool_calls`
    finish_reason: String,
}

/// What the model said.
#[derive(Serialize, ToSchema)]
struct ChatAnswer {
    role: String,
    content: Option<String>,
    #[schema(required = false)]
    tool_calls: Vec<ToolCall>,
}

/// A function that the model wants called.
#[derive(Serialize, ToSchema)]
struct ToolCall {
    id: String,
    #[serde(rename = "type")]
    kind: String,
    function: CalledFunction,
}

/// Which, and with what.
#[derive(Serialize, ToSchema)]
struct CalledFunction {
    name: String,
    /// JSON text.
    arguments: String,
}

/// What a request cost.
#[derive(Serialize, ToSchema)]
struct Usage {
    prompt_tokens: usize,
    completion_tokens: usize,
    total_tokens: usize,
    prompt_tokens_details: PromptDetails,
}

/// Of the prompt.
#[derive(Serialize, ToSchema)]
struct PromptDetails {
    /// Tokens that were not computed, because they were cached.
    cached_tokens: usize,
}

/// OpenAI's text completion.
#[derive(Serialize, ToSchema)]
pub(crate) struct Completion {
    id: String,
    /// `text_completion`
    object: String,
    created: u64,
    model: String,
    system_fingerprint: String,
    choices: Vec<TextChoice>,
    usage: Usage,
}

/// One continuation.
#[derive(Serialize, ToSchema)]
struct TextChoice {
    index: usize,
    text: String,
    logprobs: Option<TextLogprobs>,
    finish_reason: String,
}

/// Four parallel lists.
#[derive(Serialize, ToSchema)]
struct TextLogprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<Option<f32>>,
    top_logprobs: Vec<Option<Value>>,
    text_offset: Vec<usize>,
}

/// OpenAI's embeddings.
#[derive(Serialize, ToSchema)]
pub(crate) struct Embeddings {
    /// `list`
    object: String,
    model: String,
    data: Vec<Embedding>,
    usage: EmbeddingUsage,
}

/// The vector of one input.
#[derive(Serialize, ToSchema)]
struct Embedding {
    /// `embedding`
    object: String,
    index: usize,
    embedding: Vector,
}

/// As `encoding_format` wants it.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
enum Vector {
    Float(Vec<f32>),
    Base64(String),
}

/// What the inputs cost.
#[derive(Serialize, ToSchema)]
struct EmbeddingUsage {
    prompt_tokens: usize,
    total_tokens: usize,
    prompt_tokens_details: PromptDetails,
}

/// Anthropic's message.
#[derive(Serialize, ToSchema)]
pub(crate) struct AnthropicAnswer {
    id: String,
    /// `message`
    #[serde(rename = "type")]
    kind: String,
    role: String,
    model: String,
    /// `text` and `tool_use` blocks.
    content: Vec<Value>,
    /// `end_turn`, `max_tokens`, `stop_sequence` or `tool_use`
    stop_reason: String,
    stop_sequence: Option<String>,
    usage: AnthropicUsage,
}

/// The three kinds of input tokens add up to the prompt.
#[derive(Serialize, ToSchema)]
struct AnthropicUsage {
    input_tokens: usize,
    cache_creation_input_tokens: usize,
    cache_read_input_tokens: usize,
    cache_creation: Value,
    output_tokens: usize,
}

/// OpenAI's response.
#[derive(Serialize, ToSchema)]
pub(crate) struct ResponseObject {
    id: String,
    /// `response`
    object: String,
    created_at: u64,
    /// `completed` or `incomplete`
    status: String,
    model: String,
    /// `message` and `function_call` items.
    output: Vec<Value>,
    previous_response_id: Option<String>,
    /// Null until it has ended.
    usage: Option<Value>,
}
