//! What all handlers share.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use antefix_attention::method::Facts;
use antefix_constrain::{Grammar, GrammarError, Vocabulary};
use antefix_engine::BoxedConstraint;
use antefix_models::decoder::Model;
use antefix_models::template::ChatTemplate;
use antefix_models::tokenizer::Tokenizer;

use crate::auth::{Tenant, Tenants};
use crate::error::ApiError;
use crate::meters::Meters;
use crate::methods::Offer;
use crate::remembered::Remembered;
use crate::traces::Traces;
use crate::worker::Worker;

/// The server behind its routes.
pub(crate) struct App {
    pub(crate) names: Vec<String>,
    pub(crate) model: Arc<Model>,
    pub(crate) template: Option<ChatTemplate>,
    pub(crate) context: usize,
    pub(crate) strict: bool,
    pub(crate) offer: Offer,
    /// `None`: requests may not look into the model.
    pub(crate) traces: Option<Arc<Traces>>,
    pub(crate) facts: Facts,
    pub(crate) body_bytes: usize,
    pub(crate) body_timeout: Duration,
    pub(crate) request_timeout: Option<Duration>,
    pub(crate) hosts: Vec<String>,
    pub(crate) tenants: Tenants,
    pub(crate) worker: Worker,
    pub(crate) meters: Arc<Meters>,
    pub(crate) started: u64,
    pub(crate) next_id: AtomicU64,
    pub(crate) boot: u64,
    /// Answers that `/v1/responses` can go on from.
    pub(crate) remembered: Mutex<Remembered>,
    pub(crate) vocabulary: Arc<OnceLock<Result<Vocabulary, GrammarError>>>,
}

/// A request that is being answered; the drain waits for it.
pub(crate) struct Guest(Arc<Meters>);

impl Drop for Guest {
    fn drop(&mut self) {
        self.0.in_flight().fetch_sub(1, Ordering::Relaxed);
    }
}

impl App {
    pub(crate) fn tokenizer(&self) -> &Arc<Tokenizer> {
        self.worker.tokenizer()
    }

    pub(crate) fn guest(&self) -> Guest {
        self.meters.in_flight().fetch_add(1, Ordering::Relaxed);
        Guest(Arc::clone(&self.meters))
    }

    /// The traces, for a request of `tenant` that wants to leave some.
    ///
    /// # Errors
    /// When requests may not look into the model, or this one may not.
    pub(crate) fn may_look(&self, tenant: &Tenant) -> Result<&Arc<Traces>, ApiError> {
        if !tenant.analysis {
            return Err(ApiError::forbidden(
                "this key may not look into the model\nhint: it has `analysis = false`",
            ));
        }
        self.traces.as_ref().ok_or_else(|| {
            ApiError::param(
                "antefix",
                "this server does not look into its model\nhint: it was started without --analysis",
            )
        })
    }

    /// The traces of requests.
    ///
    /// # Errors
    /// When requests may not look into the model.
    pub(crate) fn traces(&self) -> Result<&Traces, ApiError> {
        self.traces.as_deref().ok_or_else(|| {
            ApiError::not_found(
                "this server does not look into its model\nhint: it was started without --analysis",
                "analysis_off",
            )
        })
    }

    /// The name by which the model is served.
    pub(crate) fn name(&self) -> &str {
        self.names.first().map_or("model", String::as_str)
    }

    pub(crate) fn check_model(&self, asked: Option<&str>) -> Result<(), ApiError> {
        match asked {
            Some(name) if !name.is_empty() && !self.names.iter().any(|n| n == name) => {
                Err(ApiError::not_found(
                    format!(
                        "the model `{name}` is not served here\nhint: this server has {}",
                        self.names.join(", ")
                    ),
                    "model_not_found",
                ))
            }
            _ => Ok(()),
        }
    }

    /// A constraint at its start. The vocabulary is prepared on first use, and nothing of it holds other requests up.
    pub(crate) async fn constrain(&self, grammar: Grammar) -> Result<BoxedConstraint, ApiError> {
        let (tokenizer, vocabulary) = (Arc::clone(self.tokenizer()), Arc::clone(&self.vocabulary));
        let made = tokio::task::spawn_blocking(move || {
            let vocabulary = vocabulary.get_or_init(|| Vocabulary::new(&tokenizer));
            match vocabulary {
                Ok(vocabulary) => vocabulary.constrain(&grammar),
                Err(error) => Err(error.clone()),
            }
        });
        match made.await {
            Ok(made) => made.map_err(|e| ApiError::param("response_format", e.to_string())),
            Err(_) => Err(ApiError::param("response_format", "the grammar cannot be used")),
        }
    }

    /// A new id, unique in this process and hardly anywhere else.
    pub(crate) fn id(&self, prefix: &str) -> String {
        let n = self.next_id.fetch_add(1, Ordering::Relaxed);
        format!("{prefix}-{:08x}{n:08x}", self.boot as u32)
    }
}

/// Unix time in seconds.
pub(crate) fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_secs())
}
