//! What the server counts: Prometheus metrics (ours and vLLM's names) and the recent history that the page plots.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use antefix_attention::method::DENSE;
use antefix_engine::{CacheStats, Done, Load, MethodReport, Usage};
use antefix_kv::Stats;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;
use serde::Serialize;

/// Steps and latencies that are kept for the page.
const HISTORY: usize = 600;

/// One step of the engine.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct StepSample {
    /// Unix time of its end, milliseconds.
    pub(crate) t_ms: u64,
    /// How long it took, milliseconds.
    pub(crate) ms: f64,
    pub(crate) prompt_rows: usize,
    pub(crate) decode_rows: usize,
}

#[derive(Default)]
struct Recent {
    steps: VecDeque<StepSample>,
    ttft_ms: VecDeque<f64>,
    itl_ms: VecDeque<f64>,
}

fn keep<T>(queue: &mut VecDeque<T>, value: T) {
    if queue.len() == HISTORY {
        queue.pop_front();
    }
    queue.push_back(value);
}

/// Percentiles of the recent past, milliseconds.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(crate) struct Percentiles {
    pub(crate) p50: f64,
    pub(crate) p99: f64,
}

impl Percentiles {
    fn of(values: &VecDeque<f64>) -> Self {
        let mut sorted: Vec<f64> = values.iter().copied().collect();
        sorted.sort_by(f64::total_cmp);
        let at = |q: f64| sorted.get((q * sorted.len().saturating_sub(1) as f64) as usize);
        Self {
            p50: at(0.50).copied().unwrap_or(0.0),
            p99: at(0.99).copied().unwrap_or(0.0),
        }
    }
}

/// The answer of `/v1/loads`.
#[derive(Debug, Serialize)]
pub(crate) struct Loads {
    running: i64,
    waiting: i64,
    kv_bytes_used: i64,
    kv_bytes_capacity: i64,
    prompt_tokens_total: u64,
    cached_tokens_total: u64,
    loaded_tokens_total: u64,
    completion_tokens_total: u64,
    preempted_total: u64,
    steps: Vec<StepSample>,
    ttft_ms: Percentiles,
    itl_ms: Percentiles,
}

/// `prefill` and `decode` with the names of their methods: as many values as there are methods, whatever their settings.
type Planners = [(&'static str, &'static str); 2];

/// `method` with its name.
type Planner = [(&'static str, &'static str); 1];

fn seconds() -> Histogram {
    Histogram::new(exponential_buckets(0.001, 2.0, 18))
}

fn shares() -> Histogram {
    Histogram::new([0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0])
}

/// All counters of one server.
pub(crate) struct Meters {
    registry: Registry,
    running: Gauge,
    waiting: Gauge,
    kv_used: Gauge,
    kv_aside: Gauge,
    kv_capacity: Gauge,
    kv_share: Gauge<f64, AtomicU64>,
    prompt_tokens: Counter,
    cached_tokens: Counter,
    loaded_tokens: Counter,
    disk_bytes: Gauge,
    disk_blocks: Gauge,
    disk_bad: Gauge,
    disk_writing: Gauge,
    disk_queue: Gauge,
    pinned: Gauge,
    completion_tokens: Counter,
    finished: Counter,
    cancelled: Counter,
    failed: Counter,
    preempted: Counter,
    pub(crate) refused: Counter,
    pub(crate) failed_steps: Counter,
    ttft: Histogram,
    itl: Histogram,
    e2e: Histogram,
    step_s: Histogram,
    by_planners: Family<Planners, Counter>,
    prefill_density: Family<Planner, Histogram>,
    decode_density: Family<Planner, Histogram>,
    plan_s: Family<Planners, Histogram>,
    recent: Mutex<Recent>,
    in_flight: AtomicUsize,
}

impl Meters {
    pub(crate) fn new() -> Self {
        let mut m = Self {
            registry: Registry::default(),
            running: Gauge::default(),
            waiting: Gauge::default(),
            kv_used: Gauge::default(),
            kv_aside: Gauge::default(),
            kv_capacity: Gauge::default(),
            kv_share: Gauge::default(),
            prompt_tokens: Counter::default(),
            cached_tokens: Counter::default(),
            loaded_tokens: Counter::default(),
            disk_bytes: Gauge::default(),
            disk_blocks: Gauge::default(),
            disk_bad: Gauge::default(),
            disk_writing: Gauge::default(),
            disk_queue: Gauge::default(),
            pinned: Gauge::default(),
            completion_tokens: Counter::default(),
            finished: Counter::default(),
            cancelled: Counter::default(),
            failed: Counter::default(),
            preempted: Counter::default(),
            refused: Counter::default(),
            failed_steps: Counter::default(),
            ttft: seconds(),
            itl: seconds(),
            e2e: seconds(),
            step_s: seconds(),
            by_planners: Family::default(),
            prefill_density: Family::new_with_constructor(shares),
            decode_density: Family::new_with_constructor(shares),
            plan_s: Family::new_with_constructor(seconds),
            recent: Mutex::default(),
            in_flight: AtomicUsize::new(0),
        };
        let r = &mut m.registry;
        r.register(
            "antefix_requests_running",
            "Sequences that hold memory",
            m.running.clone(),
        );
        r.register("antefix_requests_waiting", "Sequences in line", m.waiting.clone());
        r.register(
            "antefix_kv_bytes_used",
            "Bytes of KV pages held, and of what planners keep of keys",
            m.kv_used.clone(),
        );
        r.register(
            "antefix_kv_bytes_aside",
            "Of those, set aside for what planners keep of keys",
            m.kv_aside.clone(),
        );
        r.register(
            "antefix_kv_bytes_capacity",
            "Bytes of both at most",
            m.kv_capacity.clone(),
        );
        r.register(
            "antefix_requests_cancelled",
            "Sequences whose client left",
            m.cancelled.clone(),
        );
        r.register(
            "antefix_requests_failed",
            "Sequences lost to a failed step or constraint",
            m.failed.clone(),
        );
        r.register(
            "antefix_requests_refused",
            "Requests turned away, line full",
            m.refused.clone(),
        );
        r.register(
            "antefix_steps_failed",
            "Steps that failed",
            m.failed_steps.clone(),
        );
        r.register("antefix_step_seconds", "Time of a step", m.step_s.clone());
        r.register(
            "antefix_cache_loaded_tokens",
            "Prompt tokens read from the tiers below the memory",
            m.loaded_tokens.clone(),
        );
        let tiers = [
            ("antefix_cache_tier_bytes", "Bytes in the tiers", &m.disk_bytes),
            (
                "antefix_cache_tier_blocks",
                "Blocks of this model in the tiers",
                &m.disk_blocks,
            ),
            ("antefix_cache_tier_bad", "Damaged blocks met", &m.disk_bad),
            (
                "antefix_cache_tier_writing",
                "Tiers that still take blocks",
                &m.disk_writing,
            ),
            (
                "antefix_cache_queue_bytes",
                "Bytes that wait to be stored",
                &m.disk_queue,
            ),
            ("antefix_cache_pinned_blocks", "Pinned blocks", &m.pinned),
        ];
        for (name, help, gauge) in tiers {
            r.register(name, help, gauge.clone());
        }
        r.register(
            "antefix_method_requests",
            "Sequences that ended well, by the methods that chose the keys of their prompts and of their answers",
            m.by_planners.clone(),
        );
        r.register(
            "antefix_prefill_density",
            "Kept pairs of query and key over all, of a sequence's prompt",
            m.prefill_density.clone(),
        );
        r.register(
            "antefix_decode_density",
            "Kept pairs of query and key over all, of a sequence's answer",
            m.decode_density.clone(),
        );
        r.register(
            "antefix_plan_seconds",
            "Time that choosing keys took for a sequence",
            m.plan_s.clone(),
        );
        // vLLM's names, so that its dashboards work.
        r.register(
            "vllm:num_requests_running",
            "Sequences that hold memory",
            m.running.clone(),
        );
        r.register(
            "vllm:num_requests_waiting",
            "Sequences in line",
            m.waiting.clone(),
        );
        r.register(
            "vllm:kv_cache_usage_perc",
            "Held share of the KV pages, 0 to 1",
            m.kv_share.clone(),
        );
        r.register(
            "vllm:prefix_cache_queries",
            "Prompt tokens looked up",
            m.prompt_tokens.clone(),
        );
        r.register(
            "vllm:prefix_cache_hits",
            "Prompt tokens found cached",
            m.cached_tokens.clone(),
        );
        r.register("vllm:prompt_tokens", "Prompt tokens", m.prompt_tokens.clone());
        r.register(
            "vllm:generation_tokens",
            "Generated tokens",
            m.completion_tokens.clone(),
        );
        r.register(
            "vllm:request_success",
            "Sequences that ended well",
            m.finished.clone(),
        );
        r.register(
            "vllm:num_preemptions",
            "Sequences that lost their memory",
            m.preempted.clone(),
        );
        r.register(
            "vllm:time_to_first_token_seconds",
            "Time to the first token",
            m.ttft.clone(),
        );
        r.register(
            "vllm:time_per_output_token_seconds",
            "Time between tokens",
            m.itl.clone(),
        );
        r.register(
            "vllm:inter_token_latency_seconds",
            "Time between tokens",
            m.itl.clone(),
        );
        r.register(
            "vllm:e2e_request_latency_seconds",
            "Time of a sequence",
            m.e2e.clone(),
        );
        m
    }

    fn recent(&self) -> MutexGuard<'_, Recent> {
        self.recent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn step(&self, prompt_rows: usize, decode_rows: usize, took: Duration) {
        self.step_s.observe(took.as_secs_f64());
        let t_ms = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |d| d.as_millis() as u64);
        let sample = StepSample {
            t_ms,
            ms: took.as_secs_f64() * 1e3,
            prompt_rows,
            decode_rows,
        };
        keep(&mut self.recent().steps, sample);
    }

    pub(crate) fn first_token(&self, after: Duration) {
        self.ttft.observe(after.as_secs_f64());
        keep(&mut self.recent().ttft_ms, after.as_secs_f64() * 1e3);
    }

    pub(crate) fn next_token(&self, after: Duration) {
        self.itl.observe(after.as_secs_f64());
        keep(&mut self.recent().itl_ms, after.as_secs_f64() * 1e3);
    }

    /// `report` is what its methods say; none for dense attention.
    pub(crate) fn ended(&self, done: Done, usage: Usage, report: Option<&MethodReport>, after: Duration) {
        match done {
            Done::Cancelled => drop(self.cancelled.inc()),
            Done::Failed | Done::Constraint => drop(self.failed.inc()),
            _ => {
                self.finished.inc();
                self.e2e.observe(after.as_secs_f64());
                self.planned(report);
            }
        }
        self.prompt_tokens.inc_by(usage.prompt_tokens as u64);
        self.cached_tokens.inc_by(usage.cached_tokens as u64);
        self.loaded_tokens.inc_by(usage.loaded_tokens as u64);
        self.completion_tokens.inc_by(usage.completion_tokens as u64);
    }

    /// A sequence that ended well was planned so.
    fn planned(&self, report: Option<&MethodReport>) {
        let plan = report.and_then(|report| report.plan);
        let name = |of: Option<&'static str>| of.unwrap_or(DENSE);
        let (prefill, decode) = plan.map_or((DENSE, DENSE), |plan| (name(plan.prefill), name(plan.decode)));
        let planners = [("prefill", prefill), ("decode", decode)];
        self.by_planners.get_or_create(&planners).inc();
        let Some(plan) = plan else { return };
        self.plan_s.get_or_create(&planners).observe(plan.plan_s);
        for (family, method, density) in [
            (&self.prefill_density, prefill, plan.density),
            (&self.decode_density, decode, plan.decode_density),
        ] {
            if let Some(density) = density {
                family.get_or_create(&[("method", method)]).observe(density);
            }
        }
    }

    pub(crate) fn load(&self, load: Load, pool: Stats) {
        self.running.set(load.running as i64);
        self.waiting.set(load.waiting as i64);
        self.kv_used.set(pool.bytes_used as i64);
        self.kv_aside.set(pool.bytes_aside as i64);
        self.kv_capacity.set(pool.capacity as i64);
        self.kv_share
            .set(pool.bytes_used as f64 / pool.capacity.max(1) as f64);
        let seen = self.preempted.get();
        self.preempted.inc_by(load.preempted.saturating_sub(seen));
    }

    pub(crate) fn cache(&self, stats: &CacheStats) {
        self.pinned.set(stats.pinned as i64);
        let Some(below) = &stats.below else { return };
        let sum = |of: fn(&antefix_kv::tiers::TierStats) -> i64| below.tiers.iter().map(of).sum::<i64>();
        self.disk_bytes.set(sum(|t| t.bytes.unwrap_or(0) as i64));
        self.disk_blocks.set(sum(|t| t.blocks.unwrap_or(0) as i64));
        self.disk_bad.set(sum(|t| t.bad as i64));
        self.disk_writing.set(sum(|t| i64::from(t.off.is_none())));
        self.disk_queue.set(below.queued_bytes as i64);
    }

    /// Text in the OpenMetrics format.
    pub(crate) fn text(&self) -> String {
        let mut out = String::new();
        let _ = encode(&mut out, &self.registry); // writing to a string does not fail
        out
    }

    pub(crate) fn loads(&self) -> Loads {
        let recent = self.recent();
        Loads {
            running: self.running.get(),
            waiting: self.waiting.get(),
            kv_bytes_used: self.kv_used.get(),
            kv_bytes_capacity: self.kv_capacity.get(),
            prompt_tokens_total: self.prompt_tokens.get(),
            cached_tokens_total: self.cached_tokens.get(),
            loaded_tokens_total: self.loaded_tokens.get(),
            completion_tokens_total: self.completion_tokens.get(),
            preempted_total: self.preempted.get(),
            steps: recent.steps.iter().copied().collect(),
            ttft_ms: Percentiles::of(&recent.ttft_ms),
            itl_ms: Percentiles::of(&recent.itl_ms),
        }
    }

    /// Requests that are being answered; see [`crate::drain`].
    pub(crate) fn in_flight(&self) -> &AtomicUsize {
        &self.in_flight
    }

    pub(crate) fn is_quiet(&self) -> bool {
        self.in_flight.load(Ordering::Relaxed) == 0
    }
}
