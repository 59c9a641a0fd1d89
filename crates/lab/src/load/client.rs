//! One request to a server, with the times at which its answer came.

use std::io::{BufRead, BufReader};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// Connections that are kept open between requests.
const IDLE_CONNECTIONS: usize = 128;
/// Bytes of an answer at most.
const MAX_ANSWER: u64 = 64 << 20;

/// Why a server could not be measured.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// No connection, or it broke.
    #[error("{url}: {error}")]
    Http {
        /// Where.
        url: String,
        /// What.
        error: Box<ureq::Error>,
    },
    /// An answer that is not 200.
    #[error("{url} answers {status}: {body}")]
    Status {
        /// Where.
        url: String,
        /// HTTP status.
        status: u16,
        /// The start of the body.
        body: String,
    },
    /// An answer that makes no sense.
    #[error("{url}: {what}")]
    Answer {
        /// Where.
        url: String,
        /// What is wrong with it.
        what: String,
    },
    /// The measurement itself.
    #[error("{0}")]
    Nothing(String),
}

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// Its text.
    pub content: String,
}

impl Message {
    /// From its two parts.
    pub fn new(role: &str, content: &str) -> Self {
        Self {
            role: role.into(),
            content: content.into(),
        }
    }
}

/// Which of OpenAI's routes is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Api {
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/completions`, for models without a chat template.
    Completions,
}

/// A server.
#[derive(Clone)]
pub struct Target {
    /// Its address without a path, as in `http://127.0.0.1:8080`.
    pub url: String,
    /// API key.
    pub key: Option<String>,
    /// The name of the model.
    pub model: String,
    /// Route.
    pub api: Api,
    /// Ask for answers of full length (`ignore_eos`, which llama.cpp, vLLM and antefix know).
    pub full_length: bool,
    agent: ureq::Agent,
}

/// What one request brought.
#[derive(Debug, Clone, Default)]
pub struct Asked {
    /// From the request to the first text.
    pub first: Duration,
    /// From one text to the next.
    pub gaps: Vec<Duration>,
    /// From the request to the end.
    pub whole: Duration,
    /// The answer.
    pub text: String,
    /// Tokens of the prompt, as the server counts.
    pub prompt_tokens: u64,
    /// Of those, cached ones, as the server says.
    pub cached_tokens: u64,
    /// Tokens of the answer.
    pub completion_tokens: u64,
}

impl Asked {
    /// Seconds a token after the first one; 0 for an answer of one token.
    pub fn seconds_a_token(&self) -> f64 {
        let more = self.completion_tokens.saturating_sub(1);
        match more {
            0 => 0.0,
            n => (self.whole.saturating_sub(self.first)).as_secs_f64() / n as f64,
        }
    }
}

impl Target {
    /// A server at `url`. Its first model is used if `model` is `None`.
    ///
    /// # Errors
    /// When nobody answers there.
    pub fn new(url: &str, key: Option<String>, model: Option<String>, api: Api) -> Result<Self, LoadError> {
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .max_idle_connections(IDLE_CONNECTIONS)
            .max_idle_connections_per_host(IDLE_CONNECTIONS)
            .timeout_global(Some(Duration::from_mins(15)))
            .build();
        let mut target = Self {
            url: url.trim_end_matches('/').trim_end_matches("/v1").to_string(),
            key,
            model: model.clone().unwrap_or_default(),
            api,
            full_length: true,
            agent: config.into(),
        };
        if model.is_none() {
            let models = target.get("/v1/models")?;
            target.model = models["data"][0]["id"].as_str().unwrap_or_default().to_string();
        }
        Ok(target)
    }

    fn http(&self, path: &str, error: ureq::Error) -> LoadError {
        LoadError::Http {
            url: format!("{}{path}", self.url),
            error: Box::new(error),
        }
    }

    fn checked(
        &self,
        path: &str,
        answer: Result<ureq::http::Response<ureq::Body>, ureq::Error>,
    ) -> Result<ureq::http::Response<ureq::Body>, LoadError> {
        let mut answer = answer.map_err(|e| self.http(path, e))?;
        if answer.status().as_u16() != 200 {
            let body = answer.body_mut().read_to_string().unwrap_or_default();
            return Err(LoadError::Status {
                url: format!("{}{path}", self.url),
                status: answer.status().as_u16(),
                body: body.chars().take(300).collect(),
            });
        }
        Ok(answer)
    }

    fn parse(&self, path: &str, text: &str) -> Result<Value, LoadError> {
        serde_json::from_str(text).map_err(|e| LoadError::Answer {
            url: format!("{}{path}", self.url),
            what: format!("no JSON: {e}"),
        })
    }

    /// GETs a JSON value.
    ///
    /// # Errors
    /// When there is none.
    pub fn get(&self, path: &str) -> Result<Value, LoadError> {
        let mut request = self.agent.get(format!("{}{path}", self.url));
        if let Some(key) = &self.key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        let mut answer = self.checked(path, request.call())?;
        let text = answer
            .body_mut()
            .read_to_string()
            .map_err(|e| self.http(path, e))?;
        self.parse(path, &text)
    }

    fn post(&self, path: &str, body: &Value) -> Result<ureq::http::Response<ureq::Body>, LoadError> {
        let mut request = self
            .agent
            .post(format!("{}{path}", self.url))
            .header("content-type", "application/json");
        if let Some(key) = &self.key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        self.checked(path, request.send(body.to_string()))
    }

    /// Asks with a prompt of token ids for one token, not streamed.
    ///
    /// # Errors
    /// When the answer does not come.
    pub fn ask_tokens(&self, tokens: &[u32]) -> Result<Asked, LoadError> {
        let path = "/v1/completions";
        let body = json!({"model": self.model, "prompt": tokens, "max_tokens": 1, "temperature": 0.0});
        let start = Instant::now();
        let mut answer = self.post(path, &body)?;
        let text = answer
            .body_mut()
            .read_to_string()
            .map_err(|e| self.http(path, e))?;
        let whole = start.elapsed();
        let mut asked = Asked {
            first: whole,
            whole,
            ..Asked::default()
        };
        asked.note_usage(&self.parse(path, &text)?);
        Ok(asked)
    }

    /// Asks and reads the streamed answer. `go_on` is called at each piece of text; when it says no, the connection is closed.
    ///
    /// # Errors
    /// When the answer does not come, or breaks off.
    pub fn ask(
        &self,
        messages: &[Message],
        max_tokens: usize,
        mut go_on: impl FnMut() -> bool,
    ) -> Result<Asked, LoadError> {
        let mut body = json!({
            "model": self.model,
            "max_tokens": max_tokens,
            "temperature": 0.0,
            "stream": true,
            "stream_options": {"include_usage": true},
        });
        let path = match self.api {
            Api::Chat => {
                body["messages"] = json!(messages);
                "/v1/chat/completions"
            }
            Api::Completions => {
                let text: Vec<String> = messages
                    .iter()
                    .map(|m| format!("{}: {}", m.role, m.content))
                    .collect();
                body["prompt"] = json!(text.join("\n"));
                "/v1/completions"
            }
        };
        if self.full_length {
            body["ignore_eos"] = json!(true);
        }
        let start = Instant::now();
        let answer = self.post(path, &body)?;
        let reader = answer.into_body().into_with_config().limit(MAX_ANSWER).reader();
        let mut asked = Asked::default();
        let (mut last, mut ended) = (None, false);
        for line in BufReader::new(reader).lines() {
            let line = line.map_err(|e| self.http(path, e.into()))?;
            let now = Instant::now();
            let Some(data) = line.strip_prefix("data:").map(str::trim) else {
                continue;
            };
            if data == "[DONE]" {
                ended = true;
                break;
            }
            let event = self.parse(path, data)?;
            if let Some(error) = event.get("error").filter(|e| !e.is_null()) {
                return Err(LoadError::Answer {
                    url: format!("{}{path}", self.url),
                    what: error.to_string(),
                });
            }
            asked.note_usage(&event);
            let choice = &event["choices"][0];
            let text = choice["delta"]["content"]
                .as_str()
                .or_else(|| choice["text"].as_str());
            let Some(text) = text.filter(|t| !t.is_empty()) else {
                continue;
            };
            asked.text.push_str(text);
            match last.replace(now) {
                None => asked.first = now - start,
                Some(before) => asked.gaps.push(now - before),
            }
            if !go_on() {
                asked.whole = start.elapsed();
                return Ok(asked);
            }
        }
        asked.whole = start.elapsed();
        if last.is_none() {
            asked.first = asked.whole;
        }
        if !ended {
            return Err(LoadError::Answer {
                url: format!("{}{path}", self.url),
                what: "the answer broke off".into(),
            });
        }
        Ok(asked)
    }
}

impl Asked {
    fn note_usage(&mut self, event: &Value) {
        let Some(usage) = event.get("usage").filter(|u| u.is_object()) else {
            return;
        };
        let number = |path: &str| usage.pointer(path).and_then(Value::as_u64);
        self.prompt_tokens = number("/prompt_tokens").unwrap_or(self.prompt_tokens);
        self.completion_tokens = number("/completion_tokens").unwrap_or(self.completion_tokens);
        let cached = number("/prompt_tokens_details/cached_tokens");
        // llama.cpp tells it in a field of its own.
        let own = event.pointer("/timings/cache_n").and_then(Value::as_u64);
        self.cached_tokens = cached.or(own).unwrap_or(self.cached_tokens);
    }
}
