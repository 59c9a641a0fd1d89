//! Answers as server-sent events.

use std::convert::Infallible;
use std::future::Future;

use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use serde_json::Value;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio_stream::wrappers::UnboundedReceiverStream;

use crate::wish::Running;
use crate::worker::Happened;

/// Nobody reads the answer any more.
pub(crate) struct Gone;

/// The writing end of an answer.
pub(crate) struct Lines(UnboundedSender<Result<Event, Infallible>>);

impl Lines {
    fn event(&self, event: Event) -> bool {
        self.0.send(Ok(event)).is_ok()
    }

    /// Sends `value`; false when nobody reads any more.
    pub(crate) fn send(&self, value: &Value) -> bool {
        self.event(Event::default().data(value.to_string()))
    }

    /// Sends `value` as an event that is named after its `type`, as Anthropic's are.
    pub(crate) fn send_typed(&self, value: &Value) -> bool {
        let name = value["type"].as_str().unwrap_or("error");
        self.event(Event::default().event(name).data(value.to_string()))
    }

    /// OpenAI's mark of the end.
    pub(crate) fn done(&self) {
        self.event(Event::default().data("[DONE]")); // the client may be gone
    }

    /// What happens next to the request, `None` at its end.
    ///
    /// # Errors
    /// When the client vanished, which is noticed even while nothing is drawn.
    pub(crate) async fn next(&self, running: &mut Running) -> Result<Option<(usize, Happened)>, Gone> {
        tokio::select! {
            () = self.0.closed() => Err(Gone),
            happened = running.next() => Ok(happened),
        }
    }
}

/// Answers with what `write` sends. What it owns is dropped when it ends: a generation that still runs is then cancelled.
pub(crate) fn respond<W>(write: impl FnOnce(Lines) -> W) -> Response
where
    W: Future<Output = ()> + Send + 'static,
{
    let (out, lines) = unbounded_channel();
    tokio::spawn(write(Lines(out)));
    Sse::new(UnboundedReceiverStream::new(lines))
        .keep_alive(KeepAlive::default())
        .into_response()
}
