//! The HTTP server: OpenAI's and Anthropic's APIs over one engine.
//!
//! [`Server::start`] loads nothing and listens to nothing: it takes a model that is loaded, starts the engine's thread and hands
//! out the routes, which tests call without a socket and [`Server::serve`] puts on one.

mod about;
mod admin;
mod auth;
mod cache;
mod chat;
mod completions;
mod embeddings;
mod error;
mod guard;
mod messages;
mod meters;
mod methods;
mod net;
mod openapi;
mod page;
mod patience;
mod pins;
mod remembered;
#[cfg(feature = "remote-cache")]
mod remote;
mod responses;
mod retention;
mod routes;
mod state;
mod stream;
mod tiers;
mod tokens;
mod tools;
mod traces;
mod wish;
mod worker;

use std::future::Future;
use std::path::PathBuf;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use antefix_engine::{Engine, Options};
use antefix_kv::Fingerprint;
use antefix_models::decoder::Model;
use antefix_models::template::ChatTemplate;
use antefix_models::tokenizer::Tokenizer;
use axum::Router;
use axum::http::{HeaderName, HeaderValue};
use axum::response::Response;
use tokio::net::TcpListener;

pub use auth::{KeyConfig, KeyError};
pub use methods::{Offer, OfferError};
pub use net::ClientLimits;
pub use remembered::RememberLimits;
pub use tiers::{CacheConfig, DiskConfig, RemoteConfig};
pub use traces::Analysis;
pub use worker::Limits;

/// What `system_fingerprint` says.
pub(crate) const FINGERPRINT: &str = concat!("antefix-", env!("CARGO_PKG_VERSION"));

/// How a server runs.
#[derive(Debug, Clone)]
pub struct Config {
    /// Names under which the model answers; the first is shown.
    pub names: Vec<String>,
    /// The engine's limits.
    pub engine: Options,
    /// Where documents that are reused are kept and looked for, and the fingerprint of the model's identity; none = in memory alone.
    pub chunks: Option<(Fingerprint, PathBuf)>,
    /// Limits of the line.
    pub limits: Limits,
    /// API keys; none = everybody is let in.
    pub keys: Vec<KeyConfig>,
    /// The methods that requests can choose from.
    pub offer: Offer,
    /// Whether requests may look into the model, and how much of that is kept.
    pub analysis: Option<Analysis>,
    /// How long a request may take from its arrival to the end of its answer; requests can only shorten it.
    pub request_timeout: Option<Duration>,
    /// Refuse fields that we do not know instead of naming them in a header.
    pub strict: bool,
    /// Bytes of a request's body at most.
    pub body_bytes: usize,
    /// How long a client may take to send one.
    pub body_timeout: Duration,
    /// What clients may cost before they are answered.
    pub clients: ClientLimits,
    /// Answers that `/v1/responses` can go on from.
    pub remember: RememberLimits,
    /// Names of this server beside loopback addresses; without keys it answers to no other.
    pub hosts: Vec<String>,
    /// How long running requests may go on after the server was told to end.
    pub drain: Duration,
    /// What is cached, and where.
    pub cache: CacheConfig,
}

/// Why a server could not start or went down.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServerError {
    /// An API key.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The methods that hold where a request is silent.
    #[error(transparent)]
    Methods(#[from] OfferError),
    /// The model cannot be told from others, so nothing can be cached for it on disk.
    #[error(transparent)]
    Identity(#[from] antefix_engine::IdentityError),
    /// The cache on another machine: there is no such store, or this build cannot talk to one.
    #[error("{0}")]
    Remote(String),
    /// No thread, or the socket failed.
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

/// A server that has started.
pub struct Server {
    app: Arc<state::App>,
    config: Config,
}

impl Server {
    /// Starts the engine's thread.
    ///
    /// # Errors
    /// On a senseless key, on methods that cannot hold where a request is silent, or when there is no thread.
    pub fn start(
        model: &Arc<Model>,
        tokenizer: &Arc<Tokenizer>,
        template: Option<ChatTemplate>,
        config: Config,
    ) -> Result<Self, ServerError> {
        let tenants = auth::Tenants::new(&config.keys)?;
        let facts = model.facts();
        config.offer.check(&facts)?;
        let meters = Arc::new(meters::Meters::new());
        let cache = tiers::open(&config.cache, model)?;
        let make = {
            let (model, tokenizer, options) = (Arc::clone(model), Arc::clone(tokenizer), config.engine);
            let chunks = config.chunks.clone();
            move || {
                let engine = Engine::new(Arc::clone(&model), Arc::clone(&tokenizer), options);
                let engine = engine.with_cache(cache.clone());
                match chunks.clone() {
                    Some((fingerprint, folder)) => engine.with_chunks(fingerprint, folder),
                    None => engine,
                }
            }
        };
        let worker = worker::Worker::start(make, config.limits, Arc::clone(&meters))?;
        let app = Arc::new(state::App {
            names: config.names.clone(),
            model: Arc::clone(model),
            template,
            context: config.engine.context.min(model.spec().context),
            strict: config.strict,
            offer: config.offer.clone(),
            traces: config.analysis.map(traces::Traces::new).map(Arc::new),
            facts,
            body_bytes: config.body_bytes,
            body_timeout: config.body_timeout,
            request_timeout: config.request_timeout,
            hosts: config.hosts.clone(),
            remembered: Mutex::new(remembered::Remembered::new(config.remember)),
            tenants,
            worker,
            meters,
            started: state::now(),
            next_id: AtomicU64::new(0),
            boot: rand::random(),
            vocabulary: Arc::default(),
        });
        Ok(Self { app, config })
    }

    /// The routes.
    pub fn app(&self) -> Router {
        routes::router(Arc::clone(&self.app))
    }

    /// The routes of whoever runs the server. With keys they need one with [`KeyConfig::admin`]; without, the listener must be
    /// a loopback one.
    pub fn admin_app(&self) -> Router {
        routes::admin_router(Arc::clone(&self.app))
    }

    /// Runs `look` on the engine between two steps; nothing if the engine's thread is gone.
    pub async fn inspect<T: Send + 'static>(
        &self,
        look: impl FnOnce(&mut Engine) -> T + Send + 'static,
    ) -> Option<T> {
        self.app.worker.inspect(look).await
    }

    /// Takes no more requests, stores what is cached and gives the cache folder free. [`Server::serve`] ends with it.
    pub async fn close(&self) {
        self.app.worker.close();
        let stored = self
            .inspect(|engine| engine.close_cache(tiers::STORE_PATIENCE))
            .await;
        if stored == Some(false) {
            tracing::warn!("not everything that was cached could be stored");
        }
    }

    /// Serves `listener`, and [`Server::admin_app`] on `admin`, until `stop` resolves, then lets running requests end for at most
    /// [`Config::drain`].
    pub async fn serve(
        self,
        listener: TcpListener,
        admin: Option<TcpListener>,
        stop: impl Future<Output = ()> + Send + 'static,
    ) {
        let app = Arc::clone(&self.app);
        let drain = self.config.drain;
        let (drained, wait) = tokio::sync::oneshot::channel();
        let closing = Arc::clone(&self.app);
        if let Some(admin) = admin {
            // It ends with the process: what it serves is short.
            let forever = std::future::pending();
            tokio::spawn(net::serve(admin, self.admin_app(), self.config.clients, forever));
        }
        let serving = net::serve(listener, self.app(), self.config.clients, async move {
            stop.await;
            tracing::info!("closing: running requests may end");
            closing.worker.close();
            let _ = drained.send(Instant::now() + drain); // the receiver lives as long as the server
        });
        let deadline = async {
            let Ok(until) = wait.await else {
                return std::future::pending().await;
            };
            while Instant::now() < until && !app.meters.is_quiet() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            // What is written may still have to leave; idle keep-alive connections must not hold the server up.
            tokio::time::sleep(Duration::from_millis(100)).await;
        };
        tokio::select! {
            () = serving => {}
            () = deadline => {}
        }
        self.close().await;
    }
}

/// Names fields that were not known in a header.
pub(crate) fn note_ignored(response: &mut Response, names: &[String]) {
    if let Ok(value) = HeaderValue::from_str(&names.join(","))
        && !names.is_empty()
    {
        response
            .headers_mut()
            .insert(HeaderName::from_static("x-antefix-ignored-fields"), value);
    }
}
