//! `antefix bench --serve`, `--fairness`, `--isolation`, `--soak`: measurements through HTTP, on any server or one of our own.

mod own;

use std::time::Duration;

use antefix_lab::load::{
    self, Api, Arrivals, Fairness, FairnessPlan, Isolation, IsolationPlan, Kind, Limits, LoadError, LoadRow,
    Plan, Shape, SoakPlan, SoakSample, Spread, Target,
};
use anyhow::anyhow;
use clap::ValueEnum;

use self::own::Own;
use super::{json_line, line};
use crate::failure::Failure;
use crate::model::{ModelArgs, RunArgs};

/// The default of `--serve` without a value.
const OWN: &str = "own";

/// The value of `--model` that means a small random model, made on the spot.
const TINY: &str = "tiny-random";

#[derive(clap::Args)]
#[command(next_help_heading = "On a server")]
pub(crate) struct LoadArgs {
    /// Put load on a server: an address such as http://127.0.0.1:8080, or nothing for one of our own with `--model`
    #[arg(long, value_name = "URL", num_args = 0..=1, default_missing_value = OWN)]
    serve: Option<String>,
    /// What is asked
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "prefix-repetition,multi-turn,unique"
    )]
    traffic: Vec<KindArg>,
    /// Conversations at a time
    #[arg(long, value_delimiter = ',', default_value = "1,8,32")]
    concurrency: Vec<usize>,
    /// Conversations that arrive in a second, instead of --concurrency
    #[arg(long, value_delimiter = ',')]
    rate: Vec<f64>,
    /// Conversations of each row; default: four for each that runs at a time, 16 at least
    #[arg(long)]
    conversations: Option<usize>,
    /// Words of a system prompt, of a unique one, or of the user's turns of a conversation together
    #[arg(long, default_value_t = Shape::default().prefix)]
    prefix_words: usize,
    /// Words of a question behind a system prompt
    #[arg(long, default_value_t = Shape::default().suffix)]
    suffix_words: usize,
    /// Number of system prompts
    #[arg(long, default_value_t = Shape::default().prefixes)]
    prefixes: usize,
    /// Turns of a conversation
    #[arg(long, default_value_t = Shape::default().turns)]
    turns: usize,
    /// Tokens of an answer
    #[arg(long, default_value_t = Shape::default().output)]
    output_tokens: usize,
    /// A good request has its first token after this many milliseconds
    #[arg(long, default_value_t = Limits::default().ttft_ms)]
    ttft_ms: f64,
    /// and takes this many from token to token in the mean
    #[arg(long, default_value_t = Limits::default().itl_ms)]
    itl_ms: f64,
    /// Decides texts, coins and arrivals
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// API key of the server
    #[arg(long, env = "ANTEFIX_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
    /// Name of the server's model; default: its first
    #[arg(long)]
    served_model: Option<String>,
    /// Use /v1/completions, for models without a chat template
    #[arg(long)]
    completions: bool,
    /// Let answers end where the model ends them
    #[arg(long)]
    respect_eos: bool,
    /// What long prompts do to somebody's stream, instead of load
    #[arg(long, requires = "serve")]
    fairness: bool,
    /// Long prompts of --fairness
    #[arg(long, default_value_t = 3)]
    long_prompts: usize,
    /// Whether a tenant's prompts show in the times of another's, with as many probes, instead of load; needs our own server
    #[arg(long, value_name = "TRIALS", requires = "serve")]
    isolation: Option<usize>,
    /// Tokens of a prompt of --isolation
    #[arg(long, default_value_t = 1024)]
    secret_tokens: usize,
    /// Mixed load for as many minutes, and what the server holds meanwhile; needs our own server
    #[arg(long, value_name = "MINUTES", requires = "serve")]
    soak: Option<f64>,
    /// Part of the capacity that --soak asks for
    #[arg(long, default_value_t = 0.7)]
    share: f64,
    /// Seconds between two samples of --soak
    #[arg(long, default_value_t = 10.0)]
    sample_s: f64,
    /// A flag for our own server, as in --serve-arg=--prompt-rows=64; repeatable
    #[arg(long, value_name = "FLAG", allow_hyphen_values = true)]
    serve_arg: Vec<String>,
}

#[derive(ValueEnum, Clone, Copy)]
enum KindArg {
    PrefixRepetition,
    MultiTurn,
    Unique,
}

impl From<KindArg> for Kind {
    fn from(arg: KindArg) -> Self {
        match arg {
            KindArg::PrefixRepetition => Kind::PrefixRepetition,
            KindArg::MultiTurn => Kind::MultiTurn,
            KindArg::Unique => Kind::Unique,
        }
    }
}

impl LoadArgs {
    /// Whether a server is to be measured.
    pub(crate) fn wanted(&self) -> bool {
        self.serve.is_some()
    }

    fn check(&self) -> Result<(), Failure> {
        let positive = |x: f64| x.is_finite() && x > 0.0;
        let ok = !self.concurrency.contains(&0)
            && self.conversations != Some(0)
            && self.rate.iter().copied().all(positive)
            && [
                self.prefix_words,
                self.prefixes,
                self.turns,
                self.output_tokens,
                self.long_prompts,
            ]
            .iter()
            .all(|&n| n > 0)
            && positive(self.share)
            && positive(self.sample_s)
            && self.soak.is_none_or(positive)
            && self.isolation.is_none_or(|n| n > 0);
        match ok {
            true => Ok(()),
            false => Err(Failure::Input(anyhow!(
                "counts, rates and times must be more than 0"
            ))),
        }
    }

    fn shape(&self) -> Shape {
        Shape {
            prefix: self.prefix_words,
            suffix: self.suffix_words,
            prefixes: self.prefixes,
            turns: self.turns,
            output: self.output_tokens,
        }
    }

    fn api(&self) -> Api {
        if self.completions {
            Api::Completions
        } else {
            Api::Chat
        }
    }

    /// The server, ours if none was named.
    fn server(&self, model: &ModelArgs, run: &RunArgs) -> Result<(Option<Own>, Target), Failure> {
        let own = match self.serve.as_deref() {
            Some(OWN) | None => Some(Own::start(&model.model, run, &self.serve_arg)?),
            Some(_) => None,
        };
        let url = own
            .as_ref()
            .map_or(self.serve.as_deref().unwrap_or_default(), Own::url);
        let mut target = Target::new(url, self.api_key.clone(), self.served_model.clone(), self.api())
            .map_err(Failure::other)?;
        target.full_length = !self.respect_eos;
        Ok((own, target))
    }
}

pub(crate) fn run(args: &LoadArgs, model: &ModelArgs, run: &RunArgs, json: bool) -> Result<(), Failure> {
    args.check()?;
    if let Some(trials) = args.isolation {
        return isolation(args, model, run, trials, json);
    }
    let (own, target) = args.server(model, run)?;
    if let Some(minutes) = args.soak {
        let pid = own.as_ref().map(Own::pid).ok_or_else(no_process)?;
        return soak(args, &target, pid, minutes, json);
    }
    if args.fairness {
        let plan = FairnessPlan {
            words: args.prefix_words,
            prompts: args.long_prompts,
            idle_tokens: 200,
            most: 1 << 20,
            seed: args.seed,
        };
        let row = load::fairness(&target, &plan).map_err(Failure::other)?;
        return print_fairness(&row, json);
    }
    let closed = args.concurrency.iter().map(|&n| Arrivals::Closed(n));
    let open = args.rate.iter().map(|&r| Arrivals::Open(r));
    let arrivals: Vec<Arrivals> = match args.rate.is_empty() {
        true => closed.collect(),
        false => open.collect(),
    };
    if !json {
        line(HEAD)?;
    }
    let mut rows = 0;
    for &kind in &args.traffic {
        for &arrivals in &arrivals {
            rows += 1;
            let at_a_time = match arrivals {
                Arrivals::Closed(n) => n,
                Arrivals::Open(_) => 8,
            };
            let plan = Plan {
                kind: kind.into(),
                shape: args.shape(),
                arrivals,
                conversations: args.conversations.unwrap_or((at_a_time * 4).max(16)),
                // Every row has texts of its own: the one before may have left its own in the server's cache.
                seed: args.seed.wrapping_mul(1_000_000).wrapping_add(rows),
                limits: Limits {
                    ttft_ms: args.ttft_ms,
                    itl_ms: args.itl_ms,
                },
            };
            let row = load::run(&target, &plan).map_err(Failure::other)?;
            print_row(&row, json)?;
        }
    }
    Ok(())
}

fn no_process() -> Failure {
    Failure::Input(anyhow!(
        "this looks into the server's process or settings, so it needs our own\nhint: `--serve` without an address"
    ))
}

const HEAD: &str = "traffic            load  requests   good/s  req/s  good   tok/s  cached   ttft p50/p90/p99 ms       \
                    token p50/p90/p99 ms";

fn spread(s: Spread) -> String {
    format!("{:.0}/{:.0}/{:.0}", s.p50, s.p90, s.p99)
}

fn print_row(row: &LoadRow, json: bool) -> Result<(), Failure> {
    if json {
        return json_line(row);
    }
    let kind = match row.kind {
        Kind::PrefixRepetition => "prefix-repetition",
        Kind::MultiTurn => "multi-turn",
        Kind::Unique => "unique",
    };
    let load = match (row.concurrency, row.rate) {
        (Some(n), _) => format!("x{n}"),
        (_, Some(rate)) => format!("{rate}/s"),
        _ => String::new(),
    };
    line(format_args!(
        "{kind:<18} {load:>4} {:>9} {:>8.2} {:>6.2} {:>4.0}% {:>7.1} {:>6.0}%   {:<24}  {:.1}/{:.1}/{:.1}",
        row.requests,
        row.goodput,
        row.requests_s,
        row.good_share * 100.0,
        row.tok_s,
        row.cached_share * 100.0,
        spread(row.ttft_ms),
        row.itl_ms.p50,
        row.itl_ms.p90,
        row.itl_ms.p99,
    ))?;
    match &row.first_error {
        Some(error) => line(format_args!("  {} requests failed: {error}", row.errors)),
        None => Ok(()),
    }
}

fn print_fairness(row: &Fairness, json: bool) -> Result<(), Failure> {
    if json {
        return json_line(row);
    }
    let three = |s: Spread| format!("{:.1}/{:.1}/{:.1}", s.p50, s.p90, s.p99);
    line(format_args!(
        "idle: {} ms from token to token (p50/p90/p99 of {})",
        three(row.idle_ms),
        row.idle_gaps
    ))?;
    let seconds: Vec<String> = row.prompt_s.iter().map(|s| format!("{s:.1}")).collect();
    line(format_args!(
        "beside prompts of {} tokens: {} ms (of {}), at most {:.1} ms; those took {} s",
        row.prompt_tokens,
        three(row.busy_ms),
        row.busy_gaps,
        row.busy_max_ms,
        seconds.join(", ")
    ))?;
    line(format_args!(
        "p99 beside a long prompt: {:.2} times the idle median, {:.2} times the idle p99",
        row.factor, row.factor_p99
    ))
}

fn isolation(
    args: &LoadArgs,
    model: &ModelArgs,
    run: &RunArgs,
    trials: usize,
    json: bool,
) -> Result<(), Failure> {
    if args.serve.as_deref() != Some(OWN) {
        return Err(no_process());
    }
    let plan = IsolationPlan {
        trials,
        tokens: args.secret_tokens,
        // Ids that every vocabulary has and that are no control tokens in any we know.
        low: 32,
        kinds: 200,
        seed: args.seed,
    };
    for (caches, group) in [("apart", ""), ("shared", "group = \"everybody\"\n")] {
        let keys = own::KEYS.map(|key| format!("[[keys]]\nname = \"{key}\"\nkey = \"{key}\"\n{group}"));
        // A bounded cache: a thousand prompts push each other out instead of filling the memory.
        let config = own::Config::new(&format!("kv_mib = 512\n{}", keys.concat()))?;
        let flags = [
            args.serve_arg.as_slice(),
            &[format!("--config={}", config.path().display())],
        ]
        .concat();
        let own = Own::start(&model.model, run, &flags)?;
        let to = |key: &str| {
            Target::new(own.url(), Some(key.into()), None, Api::Completions).map_err(Failure::other)
        };
        let row =
            load::isolation(&to(own::KEYS[0])?, &to(own::KEYS[1])?, caches, &plan).map_err(Failure::other)?;
        print_isolation(&row, json)?;
    }
    Ok(())
}

fn print_isolation(row: &Isolation, json: bool) -> Result<(), Failure> {
    if json {
        return json_line(row);
    }
    line(format_args!(
        "caches {}: AUC {:.3} ({} probes, standard error {:.3}); asked before {:.2} ms, not asked {:.2} ms (medians); {} tokens found cached",
        row.caches,
        row.auc,
        row.trials,
        row.standard_error,
        row.asked_ms.p50,
        row.not_asked_ms.p50,
        row.cached_tokens
    ))
}

fn soak(args: &LoadArgs, target: &Target, pid: u32, minutes: f64, json: bool) -> Result<(), Failure> {
    let plan = SoakPlan {
        time: Duration::from_secs_f64(minutes * 60.0),
        share: args.share,
        every: Duration::from_secs_f64(args.sample_s),
        shape: args.shape(),
        seed: args.seed,
    };
    let mut samples: Vec<SoakSample> = Vec::new();
    let tell = |sample: &SoakSample| {
        samples.push(*sample);
        let printed = match json {
            true => json_line(sample),
            false => line(format_args!(
                "{:>6.1} min  rss {:>7.1} MiB  {:>3} files  {:>2} threads  {:>6} blocks  kv {:>6.1} MiB  {} answered, {} failed, {} skipped, {} open",
                sample.minutes,
                sample.rss_mb,
                sample.fds,
                sample.threads,
                sample.cache_blocks,
                sample.kv_bytes as f64 / f64::from(1 << 20),
                sample.answered,
                sample.failed,
                sample.skipped,
                sample.open
            )),
        };
        printed.map_err(|e| LoadError::Nothing(e.to_string()))
    };
    let rate = load::soak(target, pid, &plan, tell).map_err(Failure::other)?;
    let slopes = load::slopes(&samples);
    if json {
        return json_line(
            &serde_json::json!({"test": "soak", "rate": rate, "share": args.share, "minutes": minutes, "slopes": slopes}),
        );
    }
    line(format_args!(
        "{rate:.2} conversations a second ({:.0} % of capacity); slopes after the first third, an hour: rss {:+.2} MiB, files {:+.2}, \
         threads {:+.2}, blocks {:+.1}, kv {:+.2} MiB",
        args.share * 100.0,
        slopes.rss_mb_h,
        slopes.fds_h,
        slopes.threads_h,
        slopes.cache_blocks_h,
        slopes.kv_mb_h
    ))
}
