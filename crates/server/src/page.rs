//! The web page: its files are part of the program, and it loads nothing from anywhere else.

use axum::Router;
use axum::http::{HeaderValue, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;

macro_rules! files {
    ($($path:literal = $file:literal, $kind:expr;)*) => {
        /// Path, media type, content.
        const FILES: &[(&str, &str, &[u8])] = &[$(($path, $kind, include_bytes!(concat!("../web/", $file)))),*];
    };
}

const HTML: &str = "text/html; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";
const STYLE: &str = "text/css; charset=utf-8";

files! {
    "/" = "index.html", HTML;
    "/docs" = "docs.html", HTML;
    "/api.js" = "api.js", SCRIPT;
    "/chat.js" = "chat.js", SCRIPT;
    "/docs.js" = "docs.js", SCRIPT;
    "/dom.js" = "dom.js", SCRIPT;
    "/live.js" = "live.js", SCRIPT;
    "/main.js" = "main.js", SCRIPT;
    "/markdown.js" = "markdown.js", SCRIPT;
    "/store.js" = "store.js", SCRIPT;
    "/theme.js" = "theme.js", SCRIPT;
    "/style.css" = "style.css", STYLE;
    "/icon.svg" = "icon.svg", "image/svg+xml";
    "/vendor/uplot/uPlot.iife.min.js" = "vendor/uplot/uPlot.iife.min.js", SCRIPT;
    "/vendor/uplot/uPlot.min.css" = "vendor/uplot/uPlot.min.css", STYLE;
    "/vendor/uplot/LICENSE" = "vendor/uplot/LICENSE", "text/plain; charset=utf-8";
}

/// Scripts, styles and connections of this server only; the page cannot be framed by others.
const POLICY: &str = "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'self'; \
                      frame-ancestors 'none'";

/// The routes of the page. They need no key: the page asks for one and sends it with every request.
pub(crate) fn routes<S: Clone + Send + Sync + 'static>() -> Router<S> {
    FILES
        .iter()
        .fold(Router::new(), |router, (path, ..)| router.route(path, get(file)))
}

async fn file(uri: Uri) -> Response {
    let Some((_, kind, content)) = FILES.iter().find(|f| f.0 == uri.path()) else {
        return StatusCode::NOT_FOUND.into_response();
    };
    let mut response = (*content).into_response();
    let headers = response.headers_mut();
    for (name, value) in [
        (header::CONTENT_TYPE, *kind),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        // A new version of the program is a new version of the page.
        (header::CACHE_CONTROL, "no-cache"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_of_the_page_is_served() {
        fn walk(dir: &std::path::Path, found: &mut Vec<std::path::PathBuf>) {
            for entry in std::fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                match path.is_dir() {
                    true => walk(&path, found),
                    false => found.push(path),
                }
            }
        }
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("web");
        let mut found = Vec::new();
        walk(&root, &mut found);
        for path in found {
            let content = std::fs::read(&path).unwrap();
            assert!(
                FILES.iter().any(|f| f.2 == content),
                "{} is not served",
                path.display()
            );
        }
    }
}
