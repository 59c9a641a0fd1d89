//! Which path leads where, and what every request passes through.

use std::sync::Arc;

use axum::extract::{FromRequest, FromRequestParts, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderName, StatusCode};
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use http_body_util::Limited;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::limit::RequestBodyLimitLayer;
use tower_http::request_id::{MakeRequestId, PropagateRequestIdLayer, RequestId, SetRequestIdLayer};
use tower_http::trace::TraceLayer;
use utoipa::openapi::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::auth::Tenant;
use crate::error::ApiError;
use crate::state::App;
use crate::{
    about, admin, cache, chat, completions, embeddings, guard, messages, openapi, page, pins, responses,
    tokens, traces,
};

/// A JSON body whose refusal has OpenAI's shape.
pub(crate) struct Body<T>(pub(crate) T);

impl<T: DeserializeOwned> FromRequest<Arc<App>> for Body<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self, ApiError> {
        let limit = request
            .extensions()
            .get::<Arc<Tenant>>()
            .and_then(|tenant| tenant.body_bytes);
        let request = match limit {
            Some(bytes) => request.map(|body| axum::body::Body::new(Limited::new(body, bytes))),
            None => request,
        };
        // The whole body, not only its next piece: a client that sends a byte a second holds nothing up for long.
        let whole = tokio::time::timeout(app.body_timeout, Json::<Value>::from_request(request, app));
        let Ok(value) = whole.await else {
            return Err(ApiError {
                status: StatusCode::REQUEST_TIMEOUT,
                ..ApiError::invalid(format!(
                    "the body did not arrive within {} s",
                    app.body_timeout.as_secs_f32()
                ))
            });
        };
        let Json(value) = value?;
        match T::deserialize(&value) {
            Ok(body) => Ok(Self(body)),
            Err(error) => Err(ApiError {
                param: culprit::<T>(&value),
                ..ApiError::invalid(error.to_string())
            }
            .naming_param()),
        }
    }
}

/// The field without which the body would be valid; else the one that is wanted, but not like this.
fn culprit<T: DeserializeOwned>(value: &Value) -> Option<String> {
    let fields = value.as_object()?;
    let without = |name: &str| {
        let rest: serde_json::Map<_, _> = fields
            .iter()
            .filter(|(n, _)| *n != name)
            .map(|(n, v)| (n.clone(), v.clone()))
            .collect();
        T::deserialize(&Value::Object(rest)).err().map(|e| e.to_string())
    };
    let errors: Vec<(&String, Option<String>)> = fields.keys().take(64).map(|n| (n, without(n))).collect();
    let valid = errors.iter().find(|(_, e)| e.is_none());
    let missing =
        |name: &str, e: &Option<String>| e.as_ref().is_some_and(|e| e.contains(&format!("`{name}`")));
    valid
        .or_else(|| errors.iter().find(|(n, e)| missing(n, e)))
        .map(|(n, _)| (*n).clone())
}

pub(crate) type Shared = State<Arc<App>>;

/// Whoever bears a valid key. As the first argument of a handler it stands before the body is read, whose size it limits.
pub(crate) struct Caller(pub(crate) Arc<Tenant>);

impl FromRequestParts<Arc<App>> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, ApiError> {
        let tenant = app.tenants.find(&parts.headers)?;
        parts.extensions.insert(Arc::clone(&tenant));
        Ok(Self(tenant))
    }
}

/// The API: every route in it is described.
fn api() -> (Router<Arc<App>>, OpenApi) {
    let (router, mut description) = OpenApiRouter::with_openapi(openapi::start())
        .routes(routes!(chat::create))
        .routes(routes!(completions::create))
        .routes(routes!(embeddings::create))
        .routes(routes!(responses::create))
        .routes(routes!(responses::read, responses::remove))
        .routes(routes!(messages::create))
        .routes(routes!(messages::count_tokens))
        .routes(routes!(about::models))
        .routes(routes!(about::model))
        .routes(routes!(about::methods))
        .routes(routes!(cache::lookup))
        .routes(routes!(cache::stats))
        .routes(routes!(cache::tree))
        .routes(routes!(pins::pin))
        .routes(routes!(pins::unpin))
        .routes(routes!(traces::read))
        .routes(routes!(traces::tensors))
        .routes(routes!(tokens::tokenize))
        .routes(routes!(tokens::detokenize))
        .routes(routes!(tokens::apply_template))
        .routes(routes!(about::loads))
        .routes(routes!(about::metrics))
        .routes(routes!(about::health))
        .routes(routes!(about::ready))
        .routes(routes!(about::live))
        .routes(routes!(about::version))
        .routes(routes!(about::server_info))
        .split_for_parts();
    openapi::finish(&mut description);
    (router, description)
}

/// All that clients may reach.
pub(crate) fn router(app: Arc<App>) -> Router {
    let (api, description) = api();
    let description = Arc::new(description);
    let described = get(move || async move { Json(description.as_ref()).into_response() });
    let router = page::routes().merge(api).route("/openapi.json", described);
    layered(router, &app).with_state(app)
}

/// What only whoever runs the server may reach: it is served on a listener of its own.
pub(crate) fn admin_router(app: Arc<App>) -> Router {
    layered(admin::routes(), &app).with_state(app)
}

/// The layers that every route has, outermost last: request ids, log lines, panics, hosts, sizes.
fn layered(router: Router<Arc<App>>, app: &Arc<App>) -> Router<Arc<App>> {
    let id = HeaderName::from_static("x-request-id");
    router
        .fallback(nothing_here)
        .method_not_allowed_fallback(wrong_method)
        .layer(RequestBodyLimitLayer::new(app.body_bytes))
        .layer(axum::extract::DefaultBodyLimit::disable())
        .layer(from_fn_with_state(Arc::clone(app), guard::known_host))
        .layer(CatchPanicLayer::custom(panicked))
        .layer(TraceLayer::new_for_http().make_span_with(span))
        .layer(PropagateRequestIdLayer::new(id.clone()))
        .layer(SetRequestIdLayer::new(id, Numbered(Arc::clone(app))))
}

/// Numbers the requests that bring no id of their own.
#[derive(Clone)]
struct Numbered(Arc<App>);

impl MakeRequestId for Numbered {
    fn make_request_id<B>(&mut self, _: &axum::http::Request<B>) -> Option<RequestId> {
        self.0.id("req").parse().ok().map(RequestId::new)
    }
}

/// What log lines of a request start with; no query and no header but the id, which could hold secrets.
fn span<B>(request: &axum::http::Request<B>) -> tracing::Span {
    let id = request.extensions().get::<RequestId>();
    let id = id.and_then(|id| id.header_value().to_str().ok()).unwrap_or("?");
    tracing::info_span!("request", id, method = %request.method(), path = request.uri().path())
}

fn panicked(_: Box<dyn std::any::Any + Send>) -> Response {
    tracing::error!("a handler panicked");
    ApiError::internal("the request failed; the server's log says why").into_response()
}

async fn nothing_here(request: Request) -> ApiError {
    ApiError::not_found(
        format!("there is no {} here", request.uri().path()),
        "unknown_url",
    )
}

async fn wrong_method(request: Request) -> ApiError {
    ApiError {
        status: StatusCode::METHOD_NOT_ALLOWED,
        ..ApiError::invalid(format!(
            "{} does not take {}",
            request.uri().path(),
            request.method()
        ))
    }
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use tower::ServiceExt;

    use super::*;

    #[tokio::test]
    async fn a_panic_fails_its_request_only() {
        async fn handler(request: Request) -> &'static str {
            assert!(request.uri().path() != "/bad", "a mistake of ours");
            "fine"
        }
        let app = Router::new()
            .fallback(handler)
            .layer(CatchPanicLayer::custom(panicked));
        let ask = |path: &'static str| {
            app.clone()
                .oneshot(Request::get(path).body(Body::empty()).unwrap())
        };
        let bad = ask("/bad").await.unwrap();
        assert_eq!(bad.status(), 500);
        let body = axum::body::to_bytes(bad.into_body(), 10_000).await.unwrap();
        let error: Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(error["error"]["type"], "server_error");
        assert!(
            !error.to_string().contains("mistake"),
            "what went wrong is for the log"
        );
        assert_eq!(ask("/good").await.unwrap().status(), 200);
    }
}
