//! Errors as OpenAI's and Anthropic's clients expect them.

use antefix_engine::JobError;
use antefix_models::template::TemplateError;
use axum::Json;
use axum::extract::rejection::JsonRejection;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::{Value, json};
use utoipa::ToSchema;

use crate::worker::Refused;

/// OpenAI's shape of an error.
#[derive(Serialize, ToSchema)]
pub(crate) struct ErrorBody<'a> {
    error: ErrorDetail<'a>,
}

/// What went wrong.
#[derive(Serialize, ToSchema)]
struct ErrorDetail<'a> {
    /// For people; the second line may hold a hint.
    message: &'a str,
    #[serde(rename = "type")]
    kind: &'a str,
    /// The field that is to blame.
    param: Option<&'a str>,
    code: Option<&'a str>,
}

/// Something a request cannot have.
#[derive(Debug, Clone)]
pub(crate) struct ApiError {
    pub(crate) status: StatusCode,
    /// OpenAI's `type`.
    pub(crate) kind: &'static str,
    pub(crate) message: String,
    pub(crate) param: Option<String>,
    pub(crate) code: Option<&'static str>,
    pub(crate) retry_after_s: Option<u64>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        Self {
            status,
            kind,
            message: message.into(),
            param: None,
            code: None,
            retry_after_s: None,
        }
    }

    /// The request is to blame.
    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    /// The value of `param` is to blame.
    pub(crate) fn param(param: &str, message: impl Into<String>) -> Self {
        Self {
            param: Some(param.to_string()),
            ..Self::invalid(message)
        }
        .naming_param()
    }

    /// Says in the message, too, which field is to blame.
    pub(crate) fn naming_param(mut self) -> Self {
        if let Some(param) = &self.param
            && !self.message.contains(param.as_str())
        {
            self.message = format!("`{param}`: {}", self.message);
        }
        self
    }

    pub(crate) fn unauthorised() -> Self {
        Self {
            code: Some("invalid_api_key"),
            ..Self::new(
                StatusCode::UNAUTHORIZED,
                "authentication_error",
                "no valid API key was given\nhint: send `Authorization: Bearer KEY` (or `x-api-key: KEY`)",
            )
        }
    }

    pub(crate) fn forbidden(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "permission_error", message)
    }

    pub(crate) fn not_found(message: impl Into<String>, code: &'static str) -> Self {
        Self {
            code: Some(code),
            ..Self::new(StatusCode::NOT_FOUND, "not_found_error", message)
        }
    }

    pub(crate) fn too_many(message: impl Into<String>, retry_after_s: u64) -> Self {
        Self {
            code: Some("rate_limit_exceeded"),
            retry_after_s: Some(retry_after_s),
            ..Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message)
        }
    }

    pub(crate) fn unavailable(message: impl Into<String>) -> Self {
        Self {
            retry_after_s: Some(5),
            ..Self::new(StatusCode::SERVICE_UNAVAILABLE, "overloaded_error", message)
        }
    }

    /// The time that the request had is over, and there is nothing to answer with.
    pub(crate) fn timeout() -> Self {
        Self {
            code: Some("deadline_exceeded"),
            ..Self::new(
                StatusCode::GATEWAY_TIMEOUT,
                "timeout_error",
                "the time for this request was over before its first token\nhint: give it more, or try again when fewer are in line",
            )
        }
    }

    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message)
    }

    /// OpenAI's shape.
    pub(crate) fn body(&self) -> Value {
        json!(ErrorBody {
            error: ErrorDetail {
                message: &self.message,
                kind: self.kind,
                param: self.param.as_deref(),
                code: self.code,
            },
        })
    }

    /// Anthropic's shape.
    pub(crate) fn anthropic_body(&self) -> Value {
        let kind = match self.status {
            StatusCode::INTERNAL_SERVER_ERROR => "api_error",
            _ => self.kind,
        };
        json!({"type": "error", "error": {"type": kind, "message": self.message}})
    }

    fn respond(&self, body: Value) -> Response {
        let mut response = (self.status, Json(body)).into_response();
        if let Some(s) = self.retry_after_s {
            response
                .headers_mut()
                .insert(header::RETRY_AFTER, HeaderValue::from(s));
        }
        response
    }

    pub(crate) fn anthropic(&self) -> Response {
        self.respond(self.anthropic_body())
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        self.respond(self.body())
    }
}

impl From<Refused> for ApiError {
    fn from(refused: Refused) -> Self {
        let message = refused.to_string();
        match refused {
            Refused::Job(error) => {
                let (param, code) = match &error {
                    JobError::TooLong { .. } => (Some("messages"), Some("context_length_exceeded")),
                    JobError::NoTokens | JobError::Memory { .. } => (Some("max_tokens"), None),
                    JobError::TopLogprobs { .. } => (Some("top_logprobs"), None),
                    JobError::Sampling(e) => (Some(e.name), None),
                    _ => (None, None),
                };
                Self {
                    param: param.map(str::to_string),
                    code,
                    ..Self::invalid(message)
                }
            }
            Refused::Busy { retry_after_s, .. } => Self::too_many(message, retry_after_s),
            Refused::Closing => Self::unavailable(message),
        }
    }
}

impl From<TemplateError> for ApiError {
    fn from(error: TemplateError) -> Self {
        Self::param("messages", error.to_string())
    }
}

impl From<JsonRejection> for ApiError {
    fn from(rejection: JsonRejection) -> Self {
        Self {
            status: rejection.status(),
            ..Self::invalid(rejection.body_text())
        }
    }
}
