//! Connections: how many, and how slow a client may be.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_io_timeout::TimeoutStream;

/// What clients may cost before they are answered.
#[derive(Debug, Clone, Copy)]
pub struct ClientLimits {
    /// Connections at a time; more wait to be accepted.
    pub connections: usize,
    /// How long the head of a request may take, and an idle connection is kept.
    pub head: Duration,
    /// How long a client may read nothing while there is something for it to read.
    pub stalled: Duration,
}

impl Default for ClientLimits {
    fn default() -> Self {
        Self {
            connections: 1024,
            head: Duration::from_secs(30),
            stalled: Duration::from_secs(30),
        }
    }
}

/// Serves `app` on `listener` until `stop` resolves; then waits for the connections that are answering something.
pub(crate) async fn serve(
    listener: TcpListener,
    app: Router,
    limits: ClientLimits,
    stop: impl Future<Output = ()>,
) {
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(limits.head);
    let open = GracefulShutdown::new();
    let places = Arc::new(Semaphore::new(limits.connections));
    let mut stop = std::pin::pin!(stop);
    loop {
        let next = async {
            // Nobody closes the semaphore.
            let place = Arc::clone(&places).acquire_owned().await.ok()?;
            Some((place, accept(&listener).await))
        };
        let (place, stream) = tokio::select! {
            () = &mut stop => break,
            next = next => match next {
                Some(next) => next,
                None => break,
            },
        };
        // Tokens are small and should not wait for each other.
        let _ = stream.set_nodelay(true);
        let mut stream = TimeoutStream::new(stream);
        stream.set_write_timeout(Some(limits.stalled));
        let service = TowerToHyperService::new(app.clone());
        let connection = open.watch(http.serve_connection(TokioIo::new(Box::pin(stream)), service));
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection ended");
            }
            drop(place);
        });
    }
    drop(listener);
    open.shutdown().await;
}

/// The next connection. What goes wrong with one concerns nobody else; when descriptors run out, others will end.
async fn accept(listener: &TcpListener) -> TcpStream {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return stream,
            Err(error) => {
                tracing::debug!(%error, "a connection was not accepted");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}
