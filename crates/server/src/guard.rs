//! A server without keys trusts its own machine, so it must not answer to web pages that call it by another name.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{Uri, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use crate::error::ApiError;
use crate::state::App;

/// Refuses requests that were sent to a host of another name, as those of a page whose name was bound to this machine's address
/// after it was loaded. With keys nothing is refused: such a page has none.
pub(crate) async fn known_host(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let host = request
        .headers()
        .get(header::HOST)
        .map(|h| h.to_str().unwrap_or_default().to_string());
    match host {
        Some(host) if !app.tenants.need_keys() && !is_ours(&host, &app.hosts) => ApiError::forbidden(format!(
            "this server has no keys and does not answer as `{host}`\nhint: name it in `hosts`, or give the server keys"
        ))
        .into_response(),
        _ => next.run(request).await,
    }
}

/// Whether `host`, with or without a port, is a loopback address, `localhost` or one of `more`.
fn is_ours(host: &str, more: &[String]) -> bool {
    let Ok(uri) = host.parse::<Uri>() else {
        return false;
    };
    let name = uri.host().unwrap_or_default();
    let address = name.trim_start_matches('[').trim_end_matches(']');
    let loopback = address
        .parse::<std::net::IpAddr>()
        .is_ok_and(|address| address.is_loopback());
    loopback || name.eq_ignore_ascii_case("localhost") || more.iter().any(|m| m.eq_ignore_ascii_case(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_this_machine_are_ours() {
        for host in [
            "localhost",
            "LOCALHOST:8080",
            "127.0.0.1:1",
            "127.9.9.9",
            "[::1]:8080",
        ] {
            assert!(is_ours(host, &[]), "{host}");
        }
        for host in [
            "",
            "evil.example",
            "localhost.evil.example",
            "192.168.0.7:80",
            "a b",
            "127.0.0.1.evil.example",
        ] {
            assert!(!is_ours(host, &[]), "{host}");
        }
        assert!(is_ours("box.lan:8080", &["Box.lan".into()]));
    }
}
