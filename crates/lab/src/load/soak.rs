//! Hours of mixed load below capacity, and what the server's process holds meanwhile.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::client::{LoadError, Target};
use super::run::{Arrivals, Limits, Plan, run, talk};
use super::stats::slope;
use super::traffic::{Kind, Shape, gap};

/// How long and how much.
#[derive(Debug, Clone, Copy)]
pub struct SoakPlan {
    /// How long.
    pub time: Duration,
    /// Part of the capacity that is asked for.
    pub share: f64,
    /// How often is looked.
    pub every: Duration,
    /// Sizes of what is asked.
    pub shape: Shape,
    /// Decides texts and arrivals.
    pub seed: u64,
}

/// The server at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct SoakSample {
    /// Since the start of the soak.
    pub minutes: f64,
    /// Resident memory of the process, MiB.
    pub rss_mb: f64,
    /// Its open files and sockets.
    pub fds: usize,
    /// Its threads.
    pub threads: usize,
    /// Blocks in the prefix cache.
    pub cache_blocks: u64,
    /// Bytes of KV pages held, cached prefixes included.
    pub kv_bytes: u64,
    /// Answered requests so far.
    pub answered: usize,
    /// Requests that were not.
    pub failed: usize,
    /// Conversations that the client did not start, because too many were under way.
    pub skipped: usize,
    /// Conversations under way.
    pub open: usize,
}

/// What grew, by least squares over the samples after the first third, in which caches fill.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Slopes {
    /// MiB an hour.
    pub rss_mb_h: f64,
    /// Files an hour.
    pub fds_h: f64,
    /// Threads an hour.
    pub threads_h: f64,
    /// Cache blocks an hour.
    pub cache_blocks_h: f64,
    /// MiB of KV pages an hour.
    pub kv_mb_h: f64,
}

/// See [`Slopes`].
pub fn slopes(samples: &[SoakSample]) -> Slopes {
    let late = &samples[samples.len() / 3..];
    let of = |value: fn(&SoakSample) -> f64| {
        let points: Vec<_> = late.iter().map(|s| (s.minutes / 60.0, value(s))).collect();
        slope(&points)
    };
    Slopes {
        rss_mb_h: of(|s| s.rss_mb),
        fds_h: of(|s| s.fds as f64),
        threads_h: of(|s| s.threads as f64),
        cache_blocks_h: of(|s| s.cache_blocks as f64),
        kv_mb_h: of(|s| s.kv_bytes as f64 / f64::from(1 << 20)),
    }
}

/// Requests a second with as many kinds of traffic as there are, at four conversations at a time.
fn capacity(target: &Target, plan: &SoakPlan) -> Result<f64, LoadError> {
    let mut seconds_a_conversation = 0.0;
    for kind in KINDS {
        let row = run(
            target,
            &Plan {
                kind,
                shape: plan.shape,
                arrivals: Arrivals::Closed(4),
                conversations: 16,
                seed: plan.seed ^ 0x5EED,
                limits: Limits::default(),
            },
        )?;
        seconds_a_conversation += row.seconds / 16.0 / KINDS.len() as f64;
    }
    Ok(1.0 / seconds_a_conversation)
}

const KINDS: [Kind; 3] = [Kind::PrefixRepetition, Kind::MultiTurn, Kind::Unique];

/// Conversations under way at most: a server that hangs must not take the client with it.
const MOST_OPEN: usize = 256;

/// Loads `target`, whose process is `pid`, and hands each sample to `tell`. Returns the conversations a second that were started.
///
/// # Errors
/// When the capacity cannot be measured, or `/proc` or the server does not tell.
pub fn soak(
    target: &Target,
    pid: u32,
    plan: &SoakPlan,
    mut tell: impl FnMut(&SoakSample) -> Result<(), LoadError>,
) -> Result<f64, LoadError> {
    let rate = capacity(target, plan)? * plan.share;
    let start = Instant::now();
    let (answered, failed, open) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
    let skipped = AtomicUsize::new(0);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut due = Duration::ZERO;
            for i in 0u64.. {
                while start.elapsed() < due && !stop.load(Ordering::Relaxed) {
                    let left = due.saturating_sub(start.elapsed());
                    std::thread::sleep(left.min(Duration::from_millis(100)));
                }
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                due += Duration::from_secs_f64(gap(rate, plan.seed, i));
                if open.load(Ordering::Relaxed) >= MOST_OPEN {
                    skipped.fetch_add(1, Ordering::Relaxed);
                    continue;
                }
                open.fetch_add(1, Ordering::Relaxed);
                let (answered, failed, open) = (&answered, &failed, &open);
                scope.spawn(move || {
                    let one = Plan {
                        kind: KINDS[(i % KINDS.len() as u64) as usize],
                        shape: plan.shape,
                        arrivals: Arrivals::Closed(1),
                        conversations: 1,
                        seed: plan.seed,
                        limits: Limits::default(),
                    };
                    talk(target, &one, i, |asked| {
                        let to = if asked.is_ok() { answered } else { failed };
                        to.fetch_add(1, Ordering::Relaxed);
                    });
                    open.fetch_sub(1, Ordering::Relaxed);
                });
            }
        });
        let mut look = || -> Result<(), LoadError> {
            while start.elapsed() < plan.time {
                std::thread::sleep(plan.every.min(plan.time.saturating_sub(start.elapsed())));
                let stats = target.get("/v1/cache/stats")?;
                let process = Process::look(pid)?;
                tell(&SoakSample {
                    minutes: start.elapsed().as_secs_f64() / 60.0,
                    rss_mb: process.rss_mb,
                    fds: process.fds,
                    threads: process.threads,
                    cache_blocks: stats["blocks"].as_u64().unwrap_or(0),
                    kv_bytes: stats["bytes_used"].as_u64().unwrap_or(0),
                    answered: answered.load(Ordering::Relaxed),
                    failed: failed.load(Ordering::Relaxed),
                    skipped: skipped.load(Ordering::Relaxed),
                    open: open.load(Ordering::Relaxed),
                })?;
            }
            Ok(())
        };
        let looked = look();
        stop.store(true, Ordering::Relaxed);
        looked.map(|()| rate)
    })
}

struct Process {
    rss_mb: f64,
    fds: usize,
    threads: usize,
}

impl Process {
    fn look(pid: u32) -> Result<Self, LoadError> {
        let unseen = |e: std::io::Error| LoadError::Nothing(format!("/proc/{pid} cannot be read: {e}"));
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).map_err(unseen)?;
        let number = |name: &str| -> f64 {
            let line = status.lines().find(|l| l.starts_with(name)).unwrap_or_default();
            let word = line.split_whitespace().nth(1).unwrap_or_default();
            word.parse().unwrap_or(0.0)
        };
        let fds = std::fs::read_dir(format!("/proc/{pid}/fd")).map_err(unseen)?;
        Ok(Self {
            rss_mb: number("VmRSS:") / 1024.0,
            fds: fds.count(),
            threads: number("Threads:") as usize,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_third_does_not_count() {
        let sample = |i: usize| SoakSample {
            minutes: i as f64,
            // Fills for 30 minutes, then leaks one MiB a minute.
            rss_mb: if i < 30 { 10.0 * i as f64 } else { 300.0 + i as f64 },
            fds: 9,
            threads: 3,
            cache_blocks: 7,
            kv_bytes: 1 << 20,
            answered: i,
            failed: 0,
            skipped: 0,
            open: 0,
        };
        let slopes = slopes(&(0..90).map(sample).collect::<Vec<_>>());
        assert!((slopes.rss_mb_h - 60.0).abs() < 1e-6, "{slopes:?}");
        assert_eq!((slopes.fds_h, slopes.kv_mb_h), (0.0, 0.0));
    }

    #[test]
    fn this_process_can_be_seen() {
        let seen = Process::look(std::process::id()).unwrap();
        assert!(seen.rss_mb > 0.5 && seen.fds >= 3 && seen.threads >= 1);
    }
}
