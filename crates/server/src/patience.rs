//! How long a request may take: by its header, its body, or the server's settings.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::FromRequestParts;
use axum::http::HeaderName;
use axum::http::request::Parts;

use crate::error::ApiError;
use crate::state::App;

/// Milliseconds, as a whole number.
const HEADER: HeaderName = HeaderName::from_static("x-request-timeout-ms");

/// When a request came, and how long it may take.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Patience {
    came: Instant,
    most: Option<Duration>,
}

impl Default for Patience {
    /// It comes now, and may take as long as it takes.
    fn default() -> Self {
        Self {
            came: Instant::now(),
            most: None,
        }
    }
}

impl Patience {
    /// When it ends; `asked` is what its body says. The shortest of all limits holds.
    pub(crate) fn deadline(&self, asked: Option<Duration>) -> Option<Instant> {
        let limits = [self.most, asked].into_iter().flatten();
        // A time that the clock does not reach is none.
        limits.min().and_then(|limit| self.came.checked_add(limit))
    }
}

impl FromRequestParts<Arc<App>> for Patience {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, ApiError> {
        let asked = match parts.headers.get(&HEADER) {
            None => None,
            Some(value) => {
                let ms = value.to_str().ok().and_then(|text| text.parse().ok());
                Some(milliseconds(HEADER.as_str(), ms.unwrap_or(0))?)
            }
        };
        Ok(Self {
            came: Instant::now(),
            most: [app.request_timeout, asked].into_iter().flatten().min(),
        })
    }
}

/// A limit in milliseconds, at least one.
///
/// # Errors
/// When there is none.
pub(crate) fn milliseconds(name: &str, ms: u64) -> Result<Duration, ApiError> {
    match ms {
        0 => Err(ApiError::param(
            name,
            format!("`{name}` is a whole number of milliseconds, at least 1"),
        )),
        ms => Ok(Duration::from_millis(ms)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shortest_limit_holds() {
        let s = Duration::from_secs;
        let came = Instant::now();
        let patience = |most| Patience { came, most };
        assert_eq!(patience(None).deadline(None), None);
        assert_eq!(patience(Some(s(3))).deadline(None), Some(came + s(3)));
        assert_eq!(patience(None).deadline(Some(s(2))), Some(came + s(2)));
        assert_eq!(patience(Some(s(3))).deadline(Some(s(2))), Some(came + s(2)));
        assert_eq!(patience(Some(s(1))).deadline(Some(s(2))), Some(came + s(1)));
        assert_eq!(patience(None).deadline(Some(Duration::MAX)), None);
    }
}
