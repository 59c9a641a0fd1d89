//! `/v1/completions`: OpenAI's legacy API.

use std::sync::Arc;

use antefix_engine::PromptLogprob;
use antefix_models::documents;
use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

use crate::auth::Tenant;
use crate::chat::usage_json;
use crate::error::ApiError;
use crate::methods::{note, note_all, note_end};
use crate::openapi::answers::Completion;
use crate::patience::Patience;
use crate::routes::{Body, Caller, Shared};
use crate::state::{App, now};
use crate::stream;
use crate::wish::{Answer, Knobs, Reports, Running, failure, finish_reason, total, unknown};
use crate::worker::{Drawn, Happened};

/// A text, several, token ids, or several lists of them.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(untagged)]
pub(crate) enum Prompt {
    Text(String),
    Ids(Vec<u32>),
    Texts(Vec<String>),
    IdLists(Vec<Vec<u32>>),
}

impl Prompt {
    /// The tokens of each text of the field `param`.
    pub(crate) fn tokens(self, app: &App, param: &str) -> Result<Vec<Vec<u32>>, ApiError> {
        let lists = match self {
            Self::Text(text) => vec![app.tokenizer().encode_prompt(&text)],
            Self::Ids(ids) => vec![ids],
            Self::Texts(texts) => texts.iter().map(|t| app.tokenizer().encode_prompt(t)).collect(),
            Self::IdLists(lists) => lists,
        };
        match lists.is_empty() || lists.iter().any(Vec::is_empty) {
            true => Err(ApiError::param(param, format!("`{param}` is empty"))),
            false => Ok(lists),
        }
    }
}

/// A legacy request.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct CompletionRequest {
    prompt: Prompt,
    #[serde(flatten)]
    knobs: Knobs,
    logprobs: Option<usize>,
    echo: Option<bool>,
    best_of: Option<usize>,
    suffix: Option<String>,
    #[serde(flatten)]
    #[schema(ignore)]
    extra: Map<String, Value>,
}

/// OpenAI's default length of a legacy completion.
const DEFAULT_TOKENS: usize = 16;

/// OpenAI's four parallel lists.
struct Logprobs<'a> {
    app: &'a App,
    offset: usize,
    tokens: Vec<String>,
    token_logprobs: Vec<Value>,
    top_logprobs: Vec<Value>,
    text_offset: Vec<usize>,
}

impl<'a> Logprobs<'a> {
    fn new(app: &'a App, offset: usize) -> Self {
        Self {
            app,
            offset,
            tokens: Vec::new(),
            token_logprobs: Vec::new(),
            top_logprobs: Vec::new(),
            text_offset: Vec::new(),
        }
    }

    fn push(&mut self, token: u32, logprob: Option<f32>, top: &[(u32, f32)]) {
        let name = |id: u32| String::from_utf8_lossy(&self.app.tokenizer().token_bytes(id)).into_owned();
        let text = name(token);
        self.text_offset.push(self.offset);
        self.offset += text.chars().count();
        self.tokens.push(text);
        self.token_logprobs.push(json!(logprob));
        self.top_logprobs.push(match logprob {
            None => Value::Null,
            Some(_) => top
                .iter()
                .map(|&(id, lp)| (name(id), json!(lp)))
                .collect::<Map<_, _>>()
                .into(),
        });
    }

    fn prompt(&mut self, tokens: &[u32], logprobs: &[PromptLogprob]) {
        for (i, &token) in tokens.iter().enumerate() {
            match i.checked_sub(1).and_then(|i| logprobs.get(i)) {
                None => self.push(token, None, &[]),
                Some((lp, top)) => self.push(token, Some(*lp), top),
            }
        }
    }

    fn drawn(&mut self, drawn: &Drawn) {
        self.push(drawn.token, drawn.logprob, &drawn.top);
    }

    fn json(self) -> Value {
        json!({
            "tokens": self.tokens,
            "token_logprobs": self.token_logprobs,
            "top_logprobs": self.top_logprobs,
            "text_offset": self.text_offset,
        })
    }
}

struct Form {
    id: String,
    created: u64,
    model: String,
    prompts: Vec<Vec<u32>>,
    logprobs: bool,
    echo: bool,
    usage: bool,
}

impl Form {
    fn object(&self, choices: Vec<Value>, usage: Option<Value>) -> Value {
        json!({
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": crate::FINGERPRINT,
            "choices": choices,
            "usage": usage,
        })
    }

    fn echoed(&self, app: &App, prompt: usize) -> String {
        match self.echo {
            true => app.tokenizer().decode(&self.prompts[prompt]),
            false => String::new(),
        }
    }
}

/// A continuation of a text.
#[utoipa::path(
    post,
    path = "/v1/completions",
    tag = "generate",
    request_body = CompletionRequest,
    params(("x-request-timeout-ms" = Option<u64>, Header, description = "How long it may take")),
    responses((status = 200, description = "OpenAI's text completion; with `stream` its chunks as events", content(
        (Completion = "application/json"),
        (String = "text/event-stream"),
    ))),
)]
pub(crate) async fn create(
    State(app): Shared,
    Caller(tenant): Caller,
    patience: Patience,
    Body(mut request): Body<CompletionRequest>,
) -> Result<Response, ApiError> {
    request.knobs.patience = patience;
    answer(app, tenant, request).await
}

async fn answer(
    app: Arc<App>,
    tenant: Arc<Tenant>,
    request: CompletionRequest,
) -> Result<Response, ApiError> {
    let ignored = unknown(&request.extra, app.strict)?;
    if request.suffix.is_some_and(|s| !s.is_empty()) {
        return Err(ApiError::param("suffix", "`suffix` is not supported"));
    }
    let asked = request.knobs.asked(&app.offer)?;
    let with_documents = match &request.prompt {
        _ if asked.documents.is_empty() => None,
        Prompt::Text(text) => Some(documents::encode(app.tokenizer(), text, &asked.documents)),
        _ => {
            return Err(ApiError::param(
                "prompt",
                "documents stand before a text, not before token ids or several texts",
            ));
        }
    };
    let prompts: Vec<Vec<u32>> = match &with_documents {
        Some(prompt) => vec![prompt.tokens.clone()],
        None => request.prompt.tokens(&app, "prompt")?,
    };
    let top = request.logprobs.unwrap_or(0);
    let reports = Reports {
        logprobs: request.logprobs.is_some(),
        top,
        prompt: request.echo.unwrap_or(false) && request.logprobs.is_some(),
    };
    let n = request.knobs.n.unwrap_or(1);
    let best_of = request.best_of.unwrap_or(n);
    let streams = request.knobs.streams();
    if best_of < n || (streams && best_of > n) {
        return Err(ApiError::param(
            "best_of",
            "`best_of` must be at least `n`, and equal to it when streaming",
        ));
    }
    let reports = Reports {
        logprobs: reports.logprobs || best_of > n,
        ..reports
    };
    let form = Form {
        id: app.id("cmpl"),
        created: now(),
        model: app.name().to_string(),
        logprobs: request.logprobs.is_some(),
        echo: request.echo.unwrap_or(false),
        usage: request.knobs.wants_usage(),
        prompts: prompts.clone(),
    };
    let max_tokens = request.knobs.max_tokens.unwrap_or(DEFAULT_TOKENS);
    // `echo` with `max_tokens: 0` scores the prompt; one token is drawn and not shown.
    let only_score = form.echo && max_tokens == 0;
    let grammar = request.knobs.grammar()?;
    let running = request
        .knobs
        .start(
            &app,
            &tenant,
            (
                match with_documents {
                    Some(prompt) => vec![prompt],
                    None => prompts.into_iter().map(Into::into).collect(),
                },
                asked,
            ),
            best_of,
            Some(max_tokens.max(usize::from(only_score))),
            reports,
            grammar,
        )
        .await?;
    let traces = running.trace_ids();
    let mut response = match streams {
        true => streamed(app, form, running, n),
        false => {
            let answers = running.gather().await?;
            Json(whole(&app, &form, answers, n, best_of, only_score)).into_response()
        }
    };
    crate::traces::note(&mut response, &traces);
    crate::note_ignored(&mut response, &ignored);
    Ok(response)
}

/// Mean log-probability of an answer's tokens.
fn quality(answer: &Answer) -> f64 {
    let sum: f64 = answer.drawn.iter().filter_map(|d| d.logprob).map(f64::from).sum();
    sum / answer.drawn.len().max(1) as f64
}

fn whole(app: &App, form: &Form, answers: Vec<Answer>, n: usize, best_of: usize, only_score: bool) -> Value {
    let usages: Vec<_> = answers.iter().map(|a| a.usage).collect();
    let mut spent = total(&usages, best_of);
    if only_score {
        spent.completion_tokens = 0;
    }
    let mut choices = Vec::new();
    for (p, same) in answers.chunks(best_of).enumerate() {
        let scores = same.first().map_or(&[][..], |a| &a.prompt);
        let mut ranked: Vec<&Answer> = same.iter().collect();
        if best_of > n {
            ranked.sort_by(|a, b| quality(b).total_cmp(&quality(a)));
        }
        for answer in ranked.into_iter().take(n) {
            let echoed = form.echoed(app, p);
            let logprobs = form.logprobs.then(|| {
                let mut lists = Logprobs::new(app, if form.echo { 0 } else { echoed.chars().count() });
                if form.echo {
                    lists.prompt(&form.prompts[p], scores);
                }
                if !only_score {
                    answer.drawn.iter().for_each(|d| lists.drawn(d));
                }
                lists.json()
            });
            let text = if only_score { "" } else { &answer.text };
            choices.push(json!({
                "index": choices.len(),
                "text": echoed + text,
                "logprobs": logprobs,
                "finish_reason": finish_reason(answer.done),
            }));
        }
    }
    let mut body = form.object(choices, Some(usage_json(spent)));
    note_all(&mut body, &answers);
    body
}

fn streamed(app: Arc<App>, form: Form, mut running: Running, n: usize) -> Response {
    stream::respond(async move |lines| {
        let sequences = running.generation.open;
        let mut usages = vec![antefix_engine::Usage::default(); sequences];
        let mut offsets = vec![0; sequences];
        let piece = |index: usize, text: String, logprobs: Option<Value>, reason: Option<&str>| {
            let choice = json!({"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason});
            form.object(vec![choice], None)
        };
        if form.echo && !form.logprobs {
            for index in 0..sequences {
                if !lines
                    .send(&piece(index, form.echoed(&app, index / n), None, None))
                    .await
                {
                    return;
                }
            }
        }
        loop {
            let Ok(next) = lines.next(&mut running).await else {
                return;
            };
            let Some((index, happened)) = next else { break };
            let next = match happened {
                Happened::Prompt(scores) => {
                    let mut lists = Logprobs::new(&app, 0);
                    lists.prompt(&form.prompts[index / n], &scores);
                    offsets[index] = lists.offset;
                    piece(index, form.echoed(&app, index / n), Some(lists.json()), None)
                }
                Happened::Pooled(_) => continue,
                Happened::Token(drawn) => {
                    let logprobs = form.logprobs.then(|| {
                        let mut lists = Logprobs::new(&app, offsets[index]);
                        lists.drawn(&drawn);
                        offsets[index] = lists.offset;
                        lists.json()
                    });
                    if drawn.text.is_empty() && logprobs.is_none() {
                        continue;
                    }
                    piece(index, drawn.text, logprobs, None)
                }
                Happened::End {
                    done,
                    text,
                    usage,
                    method,
                } => {
                    if let Some(error) = failure(done) {
                        lines.send(&error.body()).await;
                        return;
                    }
                    usages[index] = usage;
                    let mut last = piece(index, text, None, Some(finish_reason(done)));
                    note(&mut last, method.as_deref());
                    note_end(&mut last, done);
                    last
                }
            };
            if !lines.send(&next).await {
                return;
            }
        }
        if form.usage {
            lines
                .send(&form.object(Vec::new(), Some(usage_json(total(&usages, n)))))
                .await;
        }
        lines.done().await;
    })
}
