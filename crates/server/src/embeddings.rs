//! `/v1/embeddings`: vectors of texts from a generative model. It was not trained to embed: its vectors say what a text is about, but
//! a model made for embeddings tells texts apart better.

use antefix_engine::{Pooling, RawJob};
use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

use crate::completions::Prompt;
use crate::error::ApiError;
use crate::openapi::answers::Embeddings;
use crate::patience::Patience;
use crate::routes::{Body, Caller, Shared};
use crate::state::App;
use crate::wish::{Answer, Running, unknown};

/// Inputs of a request at most, as OpenAI's.
const MAX_INPUTS: usize = 2048;
/// Inputs that are in line at a time: a long list leaves room for others.
const AT_A_TIME: usize = 32;

/// Texts to embed.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct EmbeddingRequest {
    model: Option<String>,
    /// A text, several, token ids, or several lists of them.
    input: Prompt,
    #[serde(default)]
    encoding_format: Encoding,
    /// Only the model's own width: its vectors cannot be cut.
    dimensions: Option<usize>,
    #[serde(default)]
    pooling: Pool,
    /// False: as the model has it, not of length 1.
    normalize: Option<bool>,
    cache_salt: Option<String>,
    priority: Option<i32>,
    #[serde(flatten)]
    #[schema(ignore)]
    extra: Map<String, Value>,
}

/// How a vector is written.
#[derive(Debug, Clone, Copy, Default, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum Encoding {
    /// A list of numbers.
    #[default]
    Float,
    /// Little-endian f32, in base64.
    Base64,
}

/// How the vectors of the tokens become one.
#[derive(Debug, Clone, Copy, Default, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum Pool {
    /// Their mean.
    #[default]
    Mean,
    /// The last one's: it has seen all others.
    Last,
}

impl Encoding {
    fn write(self, vector: &[f32]) -> Value {
        match self {
            Self::Float => json!(vector),
            Self::Base64 => json!(
                BASE64_STANDARD.encode(vector.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>())
            ),
        }
    }
}

/// `vector` with length 1.
fn normalised(vector: &[f32]) -> Vec<f32> {
    let length = vector.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
    vector
        .iter()
        .map(|&x| (f64::from(x) / length.max(f64::MIN_POSITIVE)) as f32)
        .collect()
}

/// Vectors of texts. The model is a generative one; see the documentation for what that means.
#[utoipa::path(
    post,
    path = "/v1/embeddings",
    tag = "generate",
    request_body = EmbeddingRequest,
    params(("x-request-timeout-ms" = Option<u64>, Header, description = "How long it may take")),
    responses((status = 200, description = "OpenAI's embeddings", body = Embeddings)),
)]
pub(crate) async fn create(
    State(app): Shared,
    Caller(tenant): Caller,
    patience: Patience,
    Body(request): Body<EmbeddingRequest>,
) -> Result<Response, ApiError> {
    let ignored = unknown(&request.extra, app.strict)?;
    app.check_model(request.model.as_deref())?;
    let width = app.model.spec().d_model;
    if let Some(asked) = request.dimensions
        && asked != width
    {
        return Err(ApiError::param(
            "dimensions",
            format!("this model's vectors have {width} dimensions and cannot be cut to {asked}"),
        ));
    }
    let prompts = request.input.tokens(&app, "input")?;
    if prompts.len() > MAX_INPUTS {
        return Err(ApiError::param("input", format!("more than {MAX_INPUTS} inputs")));
    }
    let tokens: usize = prompts.iter().map(Vec::len).sum();
    let turn = tenant.enter(tokens)?;
    let job = |tokens: &Vec<u32>| RawJob {
        tokens: tokens.clone(),
        pooling: Some(match request.pooling {
            Pool::Mean => Pooling::Mean,
            Pool::Last => Pooling::Last,
        }),
        salt: tenant.salt(request.cache_salt.as_deref()),
        tenant: tenant.number,
        deadline: patience.deadline(None),
        priority: request.priority.unwrap_or(0),
        ..RawJob::default()
    };
    let mut answers = Vec::with_capacity(prompts.len());
    for some in prompts.chunks(AT_A_TIME) {
        answers.extend(vectors(&app, some.iter().map(job).collect()).await?);
    }
    drop(turn);
    let entry = |(index, answer): (usize, &Answer)| {
        let vector = match request.normalize {
            Some(false) => answer.vector.clone(),
            _ => normalised(&answer.vector),
        };
        json!({"object": "embedding", "index": index, "embedding": request.encoding_format.write(&vector)})
    };
    let data: Vec<Value> = answers.iter().enumerate().map(entry).collect();
    let cached: usize = answers.iter().map(|a| a.usage.cached_tokens).sum();
    let mut response = Json(json!({
        "object": "list",
        "model": app.name(),
        "data": data,
        "usage": {
            "prompt_tokens": tokens,
            "total_tokens": tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
        },
    }))
    .into_response();
    crate::note_ignored(&mut response, &ignored);
    Ok(response)
}

async fn vectors(app: &App, jobs: Vec<RawJob>) -> Result<Vec<Answer>, ApiError> {
    let generation = app.worker.submit(jobs).await?;
    Running::new(generation, None, app.guest()).gather().await
}
