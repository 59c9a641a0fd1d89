//! `antefix chat`: a conversation. What was said stays in the prefix cache, so each turn computes only what is new.

use std::io::{BufRead, IsTerminal, Write};
use std::sync::atomic::Ordering;

use antefix_engine::RawJob;
use antefix_models::template::Message;
use anyhow::anyhow;

use super::run::{INTERRUPTED, SamplingArgs, answer};
use crate::failure::Failure;
use crate::model::{Loaded, ModelArgs, RunArgs};

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    run: RunArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// Tokens of an answer at most
    #[arg(short = 'n', long, default_value_t = 1024)]
    max_tokens: usize,
    /// System message
    #[arg(long)]
    system: Option<String>,
    /// Tokens of the conversation at most
    #[arg(long)]
    ctx: Option<usize>,
}

pub(crate) fn run(args: Args) -> Result<(), Failure> {
    let loaded = Loaded::new(&args.model, &args.run)?;
    let template = loaded.template()?.ok_or_else(|| {
        Failure::Input(anyhow!(
            "`{}` has no chat template\nhint: use `antefix run --raw`",
            args.model.model
        ))
    })?;
    let mut engine = loaded.engine(args.ctx)?;
    ctrlc::set_handler(|| INTERRUPTED.store(true, Ordering::Relaxed)).map_err(Failure::other)?;
    let mut messages: Vec<Message> = args
        .system
        .map(|s| Message::new("system", s))
        .into_iter()
        .collect();
    let terminal = std::io::stdin().is_terminal();
    if terminal {
        eprintln!(
            "/reset starts over, /system TEXT sets the system message, ctrl-C stops an answer, ctrl-D ends"
        );
    }
    let mut lines = std::io::stdin().lock();
    loop {
        if terminal {
            eprint!("> ");
        }
        let mut input = String::new();
        match lines.read_line(&mut input) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            // Ctrl-C at the prompt.
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(Failure::input(e)),
        }
        INTERRUPTED.store(false, Ordering::Relaxed);
        let input = input.trim();
        match input.split_once(' ').unwrap_or((input, "")) {
            ("", _) => continue,
            ("/reset", _) => {
                messages.retain(|m| m.role == "system");
                continue;
            }
            ("/system", text) => {
                messages.retain(|m| m.role != "system");
                if !text.is_empty() {
                    messages.insert(0, Message::new("system", text));
                }
                continue;
            }
            ("/quit" | "/exit", _) => return Ok(()),
            _ => messages.push(Message::new("user", input)),
        }
        let turn = || -> Result<String, Failure> {
            let text = template.render(&messages, None, true).map_err(Failure::input)?;
            let raw = RawJob {
                tokens: loaded.tokenizer.encode_prompt(&text),
                max_tokens: Some(args.max_tokens),
                sampling: args.sampling.raw(),
                ..RawJob::default()
            };
            let mut said = String::new();
            let mut out = std::io::stdout().lock();
            answer(&mut engine, raw, &mut |text| {
                said.push_str(text);
                out.write_all(text.as_bytes())?;
                out.flush()
            })?;
            writeln!(out)?;
            engine.keep_answers();
            Ok(said)
        };
        let mut turn = turn;
        match turn() {
            Ok(said) => messages.push(Message::new("assistant", said)),
            // A conversation that became too long is no reason to lose it.
            Err(failure @ Failure::Input(_)) => {
                messages.pop();
                eprintln!("antefix: {failure}\nhint: /reset starts over");
            }
            Err(failure) => return Err(failure),
        }
    }
}
