//! `antefix blend-check`: what reusing documents gains and loses on a model.

use std::path::PathBuf;
use std::sync::Arc;

use antefix_attention::ChunkUse;
use antefix_attention::method::{Profiles, RawMethods, Rig, Trust};
use antefix_kv::Pool;
use antefix_lab::median;
use antefix_lab::reuse::{Bench, Row, Sizes, Way};
use antefix_papers::ALL;
use anyhow::anyhow;

use super::{json_line, line};
use crate::failure::Failure;
use crate::model::{Loaded, ModelArgs, RunArgs};

/// Blending passes on a model if it stays this close to full prefill, in nats.
const PASSES_BELOW: f64 = 0.1;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    run: RunArgs,
    /// A method that reuses documents, NAME[,knob=value...]; repeatable
    #[arg(
        long = "method",
        value_name = "METHOD",
        default_values = ["cacheblend,ratio=0", "cacheblend", "ape,T=1,S=1", "ape"]
    )]
    methods: Vec<String>,
    /// Documents of a prompt
    #[arg(long, default_value_t = 4)]
    documents: usize,
    /// Tokens of a document
    #[arg(long, default_value_t = 512)]
    tokens: usize,
    /// Tokens of the question
    #[arg(long, default_value_t = 64)]
    question: usize,
    /// Tokens of the answer, for the time to its end
    #[arg(long, default_value_t = 32)]
    answer: usize,
    /// Prompts, each in an order of its own
    #[arg(long, default_value_t = 3)]
    prompts: usize,
    /// Also answers the same documents in this many random orders, with the first method that is no baseline
    #[arg(long, default_value_t = 0)]
    orders: usize,
    /// Also compares chunks in memory with chunks in this folder
    #[arg(long)]
    folder: Option<PathBuf>,
    /// Decides texts and orders
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// JSON, one object a line
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let sizes = Sizes {
        documents: args.documents,
        tokens: args.tokens,
        question: args.question,
        answer: args.answer,
    };
    let all = sizes.documents * sizes.tokens + sizes.question + sizes.answer + 64;
    if sizes.documents == 0 || sizes.tokens < 16 || sizes.question < 48 || args.prompts == 0 {
        return Err(Failure::Input(anyhow!(
            "too little text\nhint: at least 1 document of 16 tokens, a question of 48 and 1 prompt"
        )));
    }
    let Loaded { model, tokenizer } = Loaded::new(&args.model, &args.run)?;
    let mut ways = vec![Way::Full, Way::Prefix];
    for text in &args.methods {
        let mut raw = RawMethods::default();
        raw.add(ALL, text).map_err(Failure::input)?;
        let chosen = raw.resolve(ALL, Trust::Local).map_err(Failure::input)?;
        let program = Rig::assemble(&model.facts(), &Profiles::default().or_paths(), &chosen)
            .map_err(Failure::input)?;
        let how: Arc<dyn ChunkUse> = program
            .chunk_use()
            .cloned()
            .ok_or_else(|| Failure::Input(anyhow!("`{text}` does not reuse documents")))?;
        ways.push(Way::Reuse {
            name: text.clone(),
            how,
        });
    }
    let room = Pool::new(model.kv_shape(), 0).bytes_for(all) * 5;
    let fingerprint = antefix_engine::identity(&model)
        .map_err(Failure::other)?
        .fingerprint();
    let mut bench = Bench::new(model, room, fingerprint, args.folder.clone());
    let rows = bench
        .compare(&tokenizer, sizes, &ways, (args.prompts, args.seed))
        .map_err(Failure::other)?;
    table(args, &rows)?;
    let Some(way) = ways
        .iter()
        .find(|w| matches!(w, Way::Reuse { name, .. } if name == "cacheblend"))
        .or(ways.last())
    else {
        return Ok(());
    };
    if args.orders > 0 {
        let times = bench
            .orders(&tokenizer, sizes, way, (args.orders, args.seed))
            .map_err(Failure::other)?;
        for (i, (seconds, hits)) in times.iter().enumerate() {
            match args.json {
                true => json_line(&serde_json::json!({"order": i, "ttft_s": seconds, "hits": hits}))?,
                false => line(format_args!(
                    "order {i:2}  {:8.1} ms  hits {:.3}",
                    seconds * 1e3,
                    hits
                ))?,
            }
        }
        decay(args, &times)?;
    }
    if args.folder.is_some() {
        let (memory, disk) = bench
            .from_disk(&tokenizer, sizes, way, (args.prompts.max(5), args.seed))
            .map_err(Failure::other)?;
        match args.json {
            true => json_line(&serde_json::json!({"memory_s": memory, "disk_s": disk}))?,
            false => line(format_args!(
                "from memory {:.1} ms, from disk {:.1} ms",
                memory * 1e3,
                disk * 1e3
            ))?,
        }
    }
    Ok(())
}

/// Whether the later orders are as fast and as much reused as the earlier ones.
fn decay(args: &Args, times: &[(f64, f64)]) -> Result<(), Failure> {
    let of = |part: &[(f64, f64)]| median(&part.iter().map(|t| t.0).collect::<Vec<_>>());
    let (early, late) = times.split_at(times.len() / 2);
    let (early, late) = (of(early), of(late));
    let least = times.iter().map(|t| t.1).fold(1.0, f64::min);
    if args.json {
        return json_line(&serde_json::json!({
            "orders": times.len(), "early_half_s": early, "late_half_s": late, "least_hits": least,
        }));
    }
    line(format_args!(
        "{} orders: median {:.1} ms in the first half, {:.1} ms in the second; hits never below {least:.3}",
        times.len(),
        early * 1e3,
        late * 1e3
    ))
}

fn table(args: &Args, rows: &[Row]) -> Result<(), Failure> {
    if args.json {
        return rows.iter().try_for_each(json_line);
    }
    let width = rows.iter().map(|r| r.way.len()).max().unwrap_or(0);
    line(format_args!(
        "{:width$}  {:>9}  {:>7}  {:>9}  {:>7}  {:>6}  {:>5}  {:>8}  {:>6}",
        "", "TTFT ms", "faster", "end ms", "faster", "rows", "hits", "KL nats", "top-1"
    ))?;
    for r in rows {
        line(format_args!(
            "{:width$}  {:>9.1}  {:>6.2}x  {:>9.1}  {:>6.2}x  {:>6.3}  {:>5.2}  {:>8.4}  {:>6.3}",
            r.way,
            r.ttft_s * 1e3,
            r.speedup,
            r.end_s * 1e3,
            r.end_speedup,
            r.fresh,
            r.hits,
            r.kl,
            r.top1
        ))?;
    }
    let blended = rows.iter().find(|r| r.way == "cacheblend");
    blended.map_or(Ok(()), |r| {
        line(format_args!(
            "cacheblend {} on this model: KL {:.4}, at most {PASSES_BELOW} passes",
            if r.kl <= PASSES_BELOW {
                "passes"
            } else {
                "does not pass"
            },
            r.kl
        ))
    })
}
