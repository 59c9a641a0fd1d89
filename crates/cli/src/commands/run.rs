//! `antefix run`: one prompt, one answer.

use std::io::Write;

use antefix_attention::hooks::Told;
use antefix_attention::method::Trust;
use antefix_engine::{Engine, Event, MethodReport, RawJob, RawSampling, Usage};
use antefix_models::documents::{self, WithDocuments};
use antefix_models::template::Message;
use antefix_models::tokenizer::Specials;
use anyhow::anyhow;

use crate::failure::Failure;
use crate::hooks::HookArgs;
use crate::method::{DocumentArgs, MethodArgs, ProfileArgs};
use crate::model::{Loaded, ModelArgs, RunArgs};

/// How to choose tokens: llama.cpp's names; greedy by default.
#[derive(clap::Args, Clone)]
pub(crate) struct SamplingArgs {
    /// 0 takes the most likely token, always
    #[arg(long, default_value_t = RawSampling::default().temperature)]
    temperature: f32,
    /// Keep the k best tokens; 0 = all
    #[arg(long, default_value_t = RawSampling::default().top_k)]
    top_k: usize,
    /// Keep the smallest set of tokens with this mass
    #[arg(long, default_value_t = RawSampling::default().top_p)]
    top_p: f32,
    /// Drop tokens below this fraction of the best one's probability
    #[arg(long, default_value_t = RawSampling::default().min_p)]
    min_p: f32,
    /// Locally typical mass
    #[arg(long, default_value_t = RawSampling::default().typical)]
    typical: f32,
    /// Divides the logits of recent tokens
    #[arg(long, default_value_t = RawSampling::default().repeat_penalty)]
    repeat_penalty: f32,
    /// Subtracted once from tokens that occurred
    #[arg(long, default_value_t = RawSampling::default().presence_penalty, allow_negative_numbers = true)]
    presence_penalty: f32,
    /// Subtracted per occurrence
    #[arg(long, default_value_t = RawSampling::default().frequency_penalty, allow_negative_numbers = true)]
    frequency_penalty: f32,
    /// ID=BIAS, added to that token's logit; repeatable
    #[arg(long, value_parser = bias)]
    logit_bias: Vec<(u32, f32)>,
    /// Seed of the request's generator
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

fn bias(text: &str) -> Result<(u32, f32), String> {
    let (id, bias) = text.split_once('=').ok_or("write ID=BIAS, for example 42=-1.5")?;
    Ok((
        id.parse().map_err(|_| format!("`{id}` is no token id"))?,
        bias.parse().map_err(|_| format!("`{bias}` is no number"))?,
    ))
}

impl SamplingArgs {
    pub(crate) fn raw(&self) -> RawSampling {
        RawSampling {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            typical: self.typical,
            repeat_penalty: self.repeat_penalty,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            logit_bias: self.logit_bias.clone(),
            seed: self.seed,
            ..RawSampling::default()
        }
    }
}

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    run: RunArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    method: MethodArgs,
    #[command(flatten)]
    profile: ProfileArgs,
    #[command(flatten)]
    documents: DocumentArgs,
    /// Tokens of the answer at most
    #[arg(short = 'n', long, default_value_t = 512)]
    max_tokens: usize,
    /// End at this text; repeatable
    #[arg(long)]
    stop: Vec<String>,
    /// The prompt as it is, without the chat template; special tokens in it count
    #[arg(long)]
    raw: bool,
    /// System message
    #[arg(long, conflicts_with = "raw")]
    system: Option<String>,
    /// Tokens of prompt and answer at most
    #[arg(long)]
    ctx: Option<usize>,
    #[command(flatten)]
    hooks: HookArgs,
    /// The prompt; `-` reads standard input
    prompt: String,
}

pub(crate) fn run(args: Args) -> Result<(), Failure> {
    let prompt = if args.prompt == "-" {
        String::from_utf8(super::read(std::path::Path::new("-"))?)
            .map_err(|_| Failure::Input(anyhow!("standard input is not UTF-8")))?
    } else {
        args.prompt
    };
    let texts = args.documents.read()?;
    let profile = args.profile.read()?;
    let loaded = Loaded::new(&args.model, &args.run)?;
    if let Some(profile) = &profile {
        profile.fit(&loaded.model, &args.model.model, Trust::Local)?;
    }
    let template = if args.raw { None } else { loaded.template()? };
    let prompt = match texts.is_empty() {
        true => prompt,
        false => documents::MARK.to_string() + &prompt,
    };
    let whole = |text: &str| documents::encode(&loaded.tokenizer, text, &texts);
    let prompt = match template {
        Some(template) => {
            let system = args.system.map(|s| Message::new("system", s));
            let messages: Vec<Message> = system.into_iter().chain([Message::new("user", prompt)]).collect();
            let text = template.render(&messages, None, true).map_err(Failure::input)?;
            whole(&text)
        }
        None if args.raw || !texts.is_empty() => whole(&prompt),
        None => {
            let bos = loaded.tokenizer.bos().filter(|_| loaded.tokenizer.add_bos());
            let tokens = bos
                .into_iter()
                .chain(loaded.tokenizer.encode(&prompt, Specials::Plain));
            WithDocuments {
                tokens: tokens.collect(),
                documents: Vec::new(),
            }
        }
    };
    let program = match &profile {
        None => args.method.program(&loaded.model)?,
        Some(profile) => args
            .method
            .program_by_length(&loaded.model, profile, prompt.tokens.len())?,
    };
    let reuses = program.as_ref().is_some_and(|p| p.chunk_use().is_some());
    let mut engine = match reuses {
        true => loaded.engine_for_documents(args.ctx, prompt.tokens.len())?,
        false => loaded.engine(args.ctx)?,
    };
    let observer = args.hooks.observer(&loaded.model, prompt.tokens.len())?;
    let raw = RawJob {
        hooks: observer.clone(),
        tokens: prompt.tokens,
        documents: prompt.documents,
        program,
        max_tokens: Some(args.max_tokens),
        sampling: args.sampling.raw(),
        stop: args.stop,
        ..RawJob::default()
    };
    let mut out = std::io::stdout().lock();
    let (_, report) = answer(&mut engine, raw, &mut |text| {
        out.write_all(text.as_bytes())?;
        out.flush()
    })?;
    writeln!(out)?;
    if let Some(report) = report {
        eprintln!("{}", described(&report));
        report.told.iter().for_each(show_told);
    }
    args.hooks.write(observer.as_deref())
}

/// What the methods did, in a line.
fn described(report: &MethodReport) -> String {
    if let Some(d) = &report.documents {
        return format!(
            "[{}: {} document tokens found, {} computed, {:.1} % of the rows computed for this prompt]",
            report.settings,
            d.found,
            d.encoded,
            100.0 * d.fresh_rows as f64 / d.all_rows.max(1) as f64
        );
    }
    let read = report.plan.map_or_else(String::new, |plan| {
        let part = |who: &str, density: Option<f64>| {
            density.map_or_else(String::new, |d| {
                format!("; {who} read {:.1} % of the pairs", d * 100.0)
            })
        };
        format!(
            "{}{}; planned in {:.2} s",
            part("the prompt", plan.density),
            part("the answer", plan.decode_density),
            plan.plan_s
        )
    });
    let cut = match report.edits {
        0 => String::new(),
        1 => ", cut once".into(),
        n => format!(", cut {n} times"),
    };
    format!(
        "[{}: {:.1} % of the keys and values kept{cut}{read}]",
        report.settings,
        report.kept * 100.0
    )
}

/// What a hook tells of each row, a line each.
fn show_told(told: &Told) {
    eprintln!("[{} at {}]", told.name, told.site.full_name(told.layer));
    for (pos, row) in &told.rows {
        let each: Vec<String> = row.iter().map(|(id, x)| format!("{id} {x:.3}")).collect();
        eprintln!("  token {pos}: {}", each.join(", "));
    }
    if told.dropped > 0 {
        eprintln!("  and {} more tokens that were not kept", told.dropped);
    }
}

/// Runs one request to its end, handing text out as it comes.
pub(crate) fn answer(
    engine: &mut Engine,
    raw: RawJob,
    show: &mut dyn FnMut(&str) -> std::io::Result<()>,
) -> Result<(Usage, Option<Box<MethodReport>>), Failure> {
    let job = engine.job(raw).map_err(Failure::input)?;
    let id = engine.submit(job).map_err(Failure::input)?;
    let (mut usage, mut report) = (Usage::default(), None);
    let mut events = Vec::new();
    while !engine.is_idle() {
        engine.step(&mut events).map_err(Failure::other)?;
        if INTERRUPTED.swap(false, std::sync::atomic::Ordering::Relaxed) {
            engine.cancel(id, &mut events);
        }
        for event in events.drain(..) {
            match event {
                Event::Prompt { .. } | Event::Pooled { .. } => {}
                Event::Token { text, .. } => show(&text)?,
                Event::End {
                    text,
                    usage: used,
                    method,
                    ..
                } => {
                    show(&text)?;
                    (usage, report) = (used, method);
                }
            }
        }
    }
    Ok((usage, report))
}

/// Set by ctrl-C in `chat`: ends the answer, not the program.
pub(crate) static INTERRUPTED: std::sync::atomic::AtomicBool = std::sync::atomic::AtomicBool::new(false);
