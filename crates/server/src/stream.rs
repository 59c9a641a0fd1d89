//! Answers as server-sent events.

use std::convert::Infallible;
use std::future::Future;

use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use serde_json::Value;
use tokio::sync::mpsc::{Sender, channel};
use tokio_stream::wrappers::ReceiverStream;

use crate::wish::Running;
use crate::worker::Happened;

/// Lines that may be on their way to a client; those after them wait as events.
const LINES: usize = 64;
/// Events of a request that may wait for its client. One that is further behind is taken for gone: what it does not read must not
/// fill the memory.
const BACKLOG: usize = 16_384;

/// Nobody reads the answer any more, or too slowly.
pub(crate) struct Gone;

/// The writing end of an answer.
pub(crate) struct Lines(Sender<Result<Event, Infallible>>);

impl Lines {
    async fn event(&self, event: Event) -> bool {
        self.0.send(Ok(event)).await.is_ok()
    }

    /// Sends `value`; false when nobody reads any more.
    pub(crate) async fn send(&self, value: &Value) -> bool {
        self.event(Event::default().data(value.to_string())).await
    }

    /// Sends `value` as an event that is named after its `type`, as Anthropic's are.
    pub(crate) async fn send_typed(&self, value: &Value) -> bool {
        let name = value["type"].as_str().unwrap_or("error");
        self.event(Event::default().event(name).data(value.to_string()))
            .await
    }

    /// OpenAI's mark of the end.
    pub(crate) async fn done(&self) {
        self.event(Event::default().data("[DONE]")).await; // the client may be gone
    }

    /// What happens next to the request, `None` at its end.
    ///
    /// # Errors
    /// When the client vanished, which is noticed even while nothing is drawn, or is too far behind.
    pub(crate) async fn next(&self, running: &mut Running) -> Result<Option<(usize, Happened)>, Gone> {
        if running.generation.events.len() > BACKLOG {
            tracing::info!("a client reads too slowly: its request ends");
            return Err(Gone);
        }
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
    let (out, lines) = channel(LINES);
    tokio::spawn(write(Lines(out)));
    Sse::new(ReceiverStream::new(lines))
        .keep_alive(KeepAlive::default())
        .into_response()
}
