//! What requests captured inside the model, kept for a while for those who made them. Off unless the server runs with `--analysis`:
//! activations tell what prompts said.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use antefix_attention::hooks::{Cells, HookPlan, HookSpec, Observer, Positions, Sources};
use antefix_attention::readout::HeadReading;
use antefix_models::captures;
use antefix_models::decoder::Model;
use axum::Json;
use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::http::{HeaderName, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tokio::time::Instant;

use crate::auth::Tenant;
use crate::error::ApiError;
use crate::routes::{Caller, Shared};

/// The header that names the traces of a request, one for each sequence.
const HEADER: HeaderName = HeaderName::from_static("x-antefix-trace");

/// Numbers in one list of a specification at most: positions, layers, heads, groups.
const LIST: usize = 4096;

/// Bytes of a name at most.
const NAME: usize = 64;

/// Limits of what requests may read, and of what is kept of it.
#[derive(Debug, Clone, Copy)]
pub struct Analysis {
    /// Captures, probes and edits of a request.
    pub entries: usize,
    /// Tensors that one sequence may fill: its captures, each in every one of its layers.
    pub tensors: usize,
    /// Bytes of values and readings of one sequence; rows that do not fit are counted and left out.
    pub sequence_bytes: usize,
    /// Bytes of all traces together, with those that are being written; the oldest go first.
    pub bytes: usize,
    /// Number of traces; the oldest go first.
    pub count: usize,
    /// How long a trace is kept.
    pub age: Duration,
}

impl Default for Analysis {
    fn default() -> Self {
        Self {
            entries: 64,
            tensors: 1024,
            sequence_bytes: 64 << 20,
            bytes: 256 << 20,
            count: 64,
            age: Duration::from_mins(10),
        }
    }
}

struct Trace {
    id: String,
    tenant: u64,
    made: Instant,
    /// A safetensors file.
    tensors: Bytes,
    shapes: Vec<Value>,
    readings: Vec<(String, Vec<HeadReading>)>,
    dropped_rows: usize,
    bytes: usize,
}

#[derive(Default)]
struct Kept {
    /// By age, the oldest first.
    traces: VecDeque<Arc<Trace>>,
    /// Bytes that sequences under way may still fill.
    reserved: usize,
    /// Whether somebody waits for the oldest to become too old.
    swept: bool,
}

/// The traces of all tenants.
pub(crate) struct Traces {
    limits: Analysis,
    kept: Mutex<Kept>,
}

/// The observed sequences of a request. Dropping it gives back what they have reserved and not filled.
pub(crate) struct Watching {
    traces: Arc<Traces>,
    tenant: u64,
    sequences: Vec<Watched>,
}

struct Watched {
    id: String,
    observer: Arc<Observer>,
    reserved: usize,
}

/// What a request says about hooks, out of its `antefix` object: `capture` (a list of captures, or an object of captures and
/// probes) and `hooks` (edits and all the rest; a name there is a method).
///
/// # Errors
/// When they have another form.
pub(crate) fn asked(antefix: &Map<String, Value>) -> Result<Option<HookSpec>, ApiError> {
    let wrong = |name: &str| {
        let name = name.to_owned();
        move |e: serde_json::Error| {
            ApiError::param("antefix", format!("`antefix.{name}`: {e}\nhint: docs/hooks.md"))
        }
    };
    let mut spec = HookSpec::default();
    let mut found = false;
    if let Some(value) = antefix.get("capture").filter(|v| !v.is_null()) {
        found = true;
        match value {
            Value::Array(_) => spec.captures = Vec::deserialize(value).map_err(wrong("capture"))?,
            _ => spec = HookSpec::deserialize(value).map_err(wrong("capture"))?,
        }
        if !spec.edits.is_empty() {
            let message = "`antefix.capture` changes nothing\nhint: write `edits` under `antefix.hooks`";
            return Err(ApiError::param("antefix", message));
        }
    }
    if let Some(value) = antefix.get("hooks").filter(|v| is_spec(v)) {
        found = true;
        let more = HookSpec::deserialize(value).map_err(wrong("hooks"))?;
        spec.captures.extend(more.captures);
        spec.probes.extend(more.probes);
        spec.edits = more.edits;
        if value.get("on_hit").is_some() {
            spec.on_hit = more.on_hit;
        }
    }
    Ok(found.then_some(spec))
}

/// Whether `antefix.hooks` is a specification rather than the choice of a method.
pub(crate) fn is_spec(value: &Value) -> bool {
    value
        .as_object()
        .is_some_and(|o| !o.is_empty() && !o.contains_key("name"))
}

impl Traces {
    pub(crate) fn new(limits: Analysis) -> Self {
        Self {
            limits,
            kept: Mutex::default(),
        }
    }

    /// Checks `spec` against the limits and the model.
    ///
    /// # Errors
    /// When it does not fit.
    pub(crate) fn plan(&self, model: &Model, spec: &HookSpec) -> Result<Arc<HookPlan>, ApiError> {
        let refused = |message: String| Err(ApiError::param("antefix", message));
        let entries = spec.captures.len() + spec.probes.len() + spec.edits.len();
        if entries > self.limits.entries {
            let most = self.limits.entries;
            return refused(format!(
                "{entries} captures, probes and edits, the limit is {most}"
            ));
        }
        let mut names = spec
            .captures
            .iter()
            .map(|c| &c.id)
            .chain(spec.probes.iter().map(|p| &p.id));
        if let Some(name) = names.find(|name| name.len() > NAME) {
            return refused(format!("an `id` of {} bytes, the limit is {NAME}", name.len()));
        }
        let longest = longest_list(spec);
        if longest > LIST {
            return refused(format!(
                "a list of {longest}, the limit is {LIST}\nhint: `range` names positions that follow each other"
            ));
        }
        let plan = HookPlan::compile(spec, model.hook_shape(), &Sources::default())
            .map_err(|e| ApiError::param("antefix", e.to_string()))?;
        if plan.tensors() > self.limits.tensors {
            return refused(format!(
                "the captures fill {} tensors, the limit is {}\nhint: name fewer layers",
                plan.tensors(),
                self.limits.tensors
            ));
        }
        Ok(Arc::new(plan))
    }

    /// Observers of the sequences of a request, and memory for what they will read. `sizes`: tokens of each one's prompt, and of
    /// its answer at most; `known` unless methods change that. `id` makes names.
    ///
    /// # Errors
    /// When a prompt's captures alone are over the limit, or there is no room now.
    pub(crate) fn watch(
        self: &Arc<Self>,
        plan: &Arc<HookPlan>,
        tenant: &Tenant,
        sizes: &[(usize, usize)],
        known: bool,
        mut id: impl FnMut() -> String,
    ) -> Result<Watching, ApiError> {
        let cap = self.limits.sequence_bytes;
        let mut watching = Watching {
            traces: Arc::clone(self),
            tenant: tenant.number,
            sequences: Vec::with_capacity(sizes.len()),
        };
        let mut need = 0;
        for &(prompt, answer) in sizes {
            plan.check_cap(prompt, cap)
                .map_err(|e| ApiError::param("antefix", e.to_string()))?;
            let reserved = match plan.tensors() > 0 || plan.has_probes() {
                true if plan.has_probes() || !known => cap,
                true => plan.capture_bytes(prompt, answer).min(cap),
                false => 0,
            };
            need += reserved;
            watching.sequences.push(Watched {
                id: id(),
                observer: Arc::new(Observer::new(Arc::clone(plan), prompt, reserved)),
                reserved: 0,
            });
        }
        let most = self.limits.bytes;
        if need > most {
            let message = format!(
                "its captures may take {need} bytes, the limit of all is {most}\nhint: fewer sequences, sites, layers or positions, \
                 a smaller max_tokens, or dtype bf16"
            );
            return Err(ApiError::param("antefix", message));
        }
        let mut kept = self.lock();
        if kept.reserved + need > most {
            return Err(ApiError::too_many(
                "other requests are filling the memory for captures\nhint: try again when they have ended",
                1,
            ));
        }
        kept.reserved += need;
        for watched in &mut watching.sequences {
            watched.reserved = watched.observer.cap();
        }
        self.forget(&mut kept);
        drop(kept);
        Ok(watching)
    }

    fn keep(self: &Arc<Self>, trace: Trace, reserved: usize) {
        let mut kept = self.lock();
        kept.reserved = kept.reserved.saturating_sub(reserved);
        kept.traces.push_back(Arc::new(trace));
        self.forget(&mut kept);
        if !std::mem::replace(&mut kept.swept, true) {
            let traces = Arc::downgrade(self);
            tokio::spawn(async move {
                while let Some(next) = traces.upgrade().and_then(|traces| traces.sweep()) {
                    tokio::time::sleep_until(next).await;
                }
            });
        }
    }

    /// Forgets what is too old, and says when there will be more of it; `None` when nothing is kept.
    fn sweep(&self) -> Option<Instant> {
        let mut kept = self.lock();
        self.forget(&mut kept);
        kept.swept = !kept.traces.is_empty();
        kept.traces.front().map(|oldest| oldest.made + self.limits.age)
    }

    fn forget(&self, kept: &mut Kept) {
        let mut bytes: usize = kept.reserved + kept.traces.iter().map(|t| t.bytes).sum::<usize>();
        while let Some(oldest) = kept.traces.front() {
            let old = oldest.made.elapsed() >= self.limits.age;
            if !old && kept.traces.len() <= self.limits.count && bytes <= self.limits.bytes {
                break;
            }
            bytes -= oldest.bytes;
            kept.traces.pop_front();
        }
    }

    fn find(&self, id: &str, tenant: &Tenant) -> Result<Arc<Trace>, ApiError> {
        let mut kept = self.lock();
        self.forget(&mut kept);
        let mine = |t: &&Arc<Trace>| t.id == id && t.tenant == tenant.number;
        kept.traces.iter().find(mine).cloned().ok_or_else(|| {
            ApiError::not_found(
                format!(
                    "there is no trace `{id}`\nhint: it is there when the answer has ended, and for {} s",
                    self.limits.age.as_secs()
                ),
                "trace_not_found",
            )
        })
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The length of the longest list that sizes work and memory.
fn longest_list(spec: &HookSpec) -> usize {
    let cells = |at: &Cells| list(at.layers.as_ref(), at.heads.as_ref(), &at.positions);
    let captures = spec.captures.iter().map(|c| cells(&c.at));
    let edits = spec.edits.iter().map(|e| cells(&e.at));
    let probes = spec.probes.iter().map(|p| {
        let at = list(p.layers.as_ref(), p.heads.as_ref(), &p.positions);
        at.max(p.read.mass.len())
    });
    captures.chain(edits).chain(probes).max().unwrap_or(0)
}

fn list(layers: Option<&Vec<usize>>, heads: Option<&Vec<usize>>, positions: &Positions) -> usize {
    let positions = match positions {
        Positions::List(list) => list.len(),
        _ => 0,
    };
    let lists = [layers.map_or(0, Vec::len), heads.map_or(0, Vec::len), positions];
    lists.into_iter().max().unwrap_or(0)
}

impl Watching {
    /// The observer of sequence `i`.
    pub(crate) fn observer(&self, i: usize) -> Option<Arc<Observer>> {
        self.sequences.get(i).map(|w| Arc::clone(&w.observer))
    }

    /// The names under which traces will be found when their sequences have ended; none if nothing is read.
    pub(crate) fn ids(&self) -> Vec<String> {
        let read = self.sequences.iter().filter(|w| reads(w.observer.plan()));
        read.map(|w| w.id.clone()).collect()
    }

    /// Keeps what sequence `i`, which has ended, has captured and read.
    pub(crate) fn keep(&mut self, i: usize) {
        let Some(watched) = self.sequences.get_mut(i) else {
            return;
        };
        if !reads(watched.observer.plan()) {
            return;
        }
        let captured = watched.observer.take();
        let shapes = captured
            .iter()
            .map(|c| json!({ "name": c.name(), "rows": c.positions.len(), "width": c.width }));
        let tensors = captures::to_bytes(&captured).unwrap_or_else(|error| {
            tracing::error!(%error, trace = watched.id, "captures could not be kept");
            Vec::new()
        });
        let readings = watched.observer.take_readings();
        let read: usize = readings.iter().flat_map(|r| &r.1).map(HeadReading::bytes).sum();
        let trace = Trace {
            id: watched.id.clone(),
            tenant: self.tenant,
            made: Instant::now(),
            shapes: shapes.collect(),
            bytes: tensors.len() + read,
            tensors: tensors.into(),
            readings,
            dropped_rows: watched.observer.dropped(),
        };
        self.traces.keep(trace, std::mem::take(&mut watched.reserved));
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        let left: usize = self.sequences.iter().map(|w| w.reserved).sum();
        let mut kept = self.traces.lock();
        kept.reserved = kept.reserved.saturating_sub(left);
    }
}

fn reads(plan: &HookPlan) -> bool {
    plan.tensors() > 0 || plan.has_probes()
}

/// Names the traces of a request in a header.
pub(crate) fn note(response: &mut Response, ids: &[String]) {
    if let Ok(value) = HeaderValue::from_str(&ids.join(","))
        && !ids.is_empty()
    {
        response.headers_mut().insert(HEADER, value);
    }
}

/// What a request captured, and what its probes read; for the key that made the request, on a server that analyses.
#[utoipa::path(
    get,
    path = "/v1/traces/{id}",
    tag = "analysis",
    params(("id" = String, Path, description = "Out of `x-antefix-trace`")),
    responses((status = 200, description = "`tensors`, `probes`, `dropped_rows`", body = Object)),
)]
pub(crate) async fn read(
    State(app): Shared,
    Caller(tenant): Caller,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let trace = app.traces()?.find(&id, &tenant)?;
    let probe = |(id, heads): &(String, Vec<HeadReading>)| json!({ "id": id, "heads": heads });
    Ok(Json(json!({
        "id": trace.id,
        "object": "trace",
        "tensors": trace.shapes,
        "bytes": trace.tensors.len(),
        "probes": trace.readings.iter().map(probe).collect::<Vec<_>>(),
        "dropped_rows": trace.dropped_rows,
    })))
}

/// Its tensors, as a safetensors file.
#[utoipa::path(
    get,
    path = "/v1/traces/{id}/tensors",
    tag = "analysis",
    params(("id" = String, Path, description = "Out of `x-antefix-trace`")),
    responses((status = 200, description = "A safetensors file", body = Vec<u8>, content_type = "application/octet-stream")),
)]
pub(crate) async fn tensors(
    State(app): Shared,
    Caller(tenant): Caller,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    let trace = app.traces()?.find(&id, &tenant)?;
    let kind = [(header::CONTENT_TYPE, "application/octet-stream")];
    Ok((kind, trace.tensors.clone()).into_response())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trace(id: &str, bytes: usize) -> Trace {
        Trace {
            id: id.into(),
            tenant: 0,
            made: Instant::now(),
            tensors: Bytes::new(),
            shapes: Vec::new(),
            readings: Vec::new(),
            dropped_rows: 0,
            bytes,
        }
    }

    fn ids(traces: &Traces) -> Vec<String> {
        traces.lock().traces.iter().map(|t| t.id.clone()).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_outlives_its_age_though_nobody_asks() {
        let traces = Arc::new(Traces::new(Analysis {
            age: Duration::from_mins(1),
            ..Analysis::default()
        }));
        let second = Duration::from_secs(1);
        traces.keep(trace("a", 1), 0);
        tokio::time::sleep(second * 30).await;
        traces.keep(trace("b", 1), 0);
        tokio::time::sleep(second * 29).await;
        assert_eq!(ids(&traces), ["a", "b"]);
        tokio::time::sleep(second * 2).await;
        assert_eq!(ids(&traces), ["b"]);
        tokio::time::sleep(second * 30).await;
        assert!(ids(&traces).is_empty());
        // The sweeper has ended, and comes back.
        traces.keep(trace("c", 1), 0);
        tokio::time::sleep(second * 61).await;
        assert!(ids(&traces).is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn reserved_bytes_drive_the_oldest_out() {
        let traces = Arc::new(Traces::new(Analysis {
            bytes: 100,
            ..Analysis::default()
        }));
        traces.keep(trace("a", 40), 0);
        traces.keep(trace("b", 40), 0);
        assert_eq!(ids(&traces), ["a", "b"]);
        traces.lock().reserved = 30;
        traces.keep(trace("c", 20), 20);
        assert_eq!(ids(&traces), ["b", "c"]);
        assert_eq!(traces.lock().reserved, 10);
    }
}
