//! Where log lines and spans go: lines to standard error, spans to an OpenTelemetry collector if there is one.

use std::io::IsTerminal;

use anyhow::anyhow;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry};

use crate::failure::Failure;

type Boxed = Box<dyn Layer<Registry> + Send + Sync>;

/// What is still to be sent leaves when it is dropped.
pub(crate) struct Telemetry {
    /// Never looked at in a program that cannot export.
    #[cfg_attr(not(feature = "otlp"), allow(dead_code, reason = "there is nothing to send"))]
    exporter: Option<Exporter>,
}

/// Starts both. `endpoint` is the collector's address, `http://HOST:4318`.
///
/// # Errors
/// When the address is none, or this program cannot export.
pub(crate) fn start(endpoint: Option<&str>) -> Result<Telemetry, Failure> {
    let mut layers: Vec<Boxed> = Vec::new();
    let exporter = match endpoint {
        None => None,
        Some(endpoint) => {
            let (layer, exporter) = export(endpoint)?;
            layers.push(layer);
            Some(exporter)
        }
    };
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    layers.push(lines.boxed());
    let filter = EnvFilter::try_from_env("ANTEFIX_LOG");
    let filter = filter.unwrap_or_else(|_| "info,tower_http=warn".into());
    tracing_subscriber::registry().with(layers).with(filter).init();
    Ok(Telemetry { exporter })
}

fn wrong(endpoint: &str, why: &str) -> Failure {
    Failure::Input(anyhow!("`otlp_endpoint` is {endpoint}: {why}"))
}

#[cfg(not(feature = "otlp"))]
enum Exporter {}

#[cfg(not(feature = "otlp"))]
fn export(endpoint: &str) -> Result<(Boxed, Exporter), Failure> {
    Err(wrong(
        endpoint,
        "this program was built without export\nhint: cargo build --release --features otlp",
    ))
}

#[cfg(feature = "otlp")]
use opentelemetry_sdk::trace::SdkTracerProvider as Exporter;

/// OTLP over HTTP, protobuf. Spans are sent in batches by a thread of their own; what the collector does not take is dropped.
#[cfg(feature = "otlp")]
fn export(endpoint: &str) -> Result<(Boxed, Exporter), Failure> {
    use opentelemetry::trace::TracerProvider;
    use opentelemetry_otlp::{SpanExporter, WithExportConfig};
    use opentelemetry_sdk::Resource;

    if !endpoint.starts_with("http://") {
        let why = "it must start with http://\nhint: a collector on this machine can send on over TLS";
        return Err(wrong(endpoint, why));
    }
    let exporter = SpanExporter::builder()
        .with_http()
        .with_endpoint(format!("{}/v1/traces", endpoint.trim_end_matches('/')))
        .build()
        .map_err(|e| wrong(endpoint, &e.to_string()))?;
    let provider = Exporter::builder()
        .with_batch_exporter(exporter)
        .with_resource(Resource::builder().with_service_name("antefix").build())
        .build();
    let layer = tracing_opentelemetry::layer().with_tracer(provider.tracer("antefix"));
    Ok((layer.boxed(), provider))
}

#[cfg(feature = "otlp")]
impl Drop for Telemetry {
    fn drop(&mut self) {
        if let Some(Err(error)) = self.exporter.as_ref().map(Exporter::shutdown) {
            eprintln!("the last spans were not sent: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(not(feature = "otlp"))]
    #[test]
    fn a_program_that_cannot_export_says_so() {
        let error = export("http://127.0.0.1:4318").err().unwrap();
        assert!(error.to_string().contains("--features otlp"), "{error}");
        assert_eq!(error.code(), 2);
    }

    /// A collector that takes one message and returns its head and body.
    #[cfg(feature = "otlp")]
    fn collector() -> (String, std::thread::JoinHandle<(String, Vec<u8>)>) {
        use std::io::{BufRead, BufReader, Read, Write};

        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let taken = std::thread::spawn(move || {
            let (mut socket, _) = listener.accept().unwrap();
            let mut reader = BufReader::new(socket.try_clone().unwrap());
            let mut head = String::new();
            while !head.ends_with("\r\n\r\n") {
                assert!(reader.read_line(&mut head).unwrap() > 0, "{head}");
            }
            let length = head.lines().find_map(|line| {
                let (name, value) = line.split_once(':')?;
                name.eq_ignore_ascii_case("content-length")
                    .then(|| value.trim().parse().unwrap())
            });
            let mut body = vec![0; length.unwrap()];
            reader.read_exact(&mut body).unwrap();
            let answer =
                "HTTP/1.1 200 OK\r\ncontent-type: application/x-protobuf\r\ncontent-length: 0\r\n\r\n";
            socket.write_all(answer.as_bytes()).unwrap();
            (head, body)
        });
        (address, taken)
    }

    #[cfg(feature = "otlp")]
    #[test]
    fn spans_reach_a_collector() {
        let (address, taken) = collector();
        let (layer, exporter) = export(&address).map_err(|e| e.to_string()).unwrap();
        let subscriber = tracing_subscriber::registry().with(vec![layer]);
        tracing::subscriber::with_default(subscriber, || {
            tracing::info_span!("request", id = "req-17", path = "/v1/completions").in_scope(|| ());
        });
        drop(Telemetry {
            exporter: Some(exporter),
        });
        let (head, body) = taken.join().unwrap();
        assert!(head.starts_with("POST /v1/traces HTTP/1.1"), "{head}");
        assert!(head.to_lowercase().contains("application/x-protobuf"), "{head}");
        // Protobuf keeps texts as they are.
        let body = String::from_utf8_lossy(&body);
        for text in ["service.name", "antefix", "request", "req-17", "/v1/completions"] {
            assert!(body.contains(text), "no {text}: {body}");
        }
    }

    #[cfg(feature = "otlp")]
    #[test]
    fn an_address_that_is_none_is_refused() {
        for bad in ["https://example.invalid", "localhost:4318", "http://"] {
            let error = export(bad).err().unwrap();
            assert!(error.to_string().contains(bad), "{error}");
        }
    }
}
