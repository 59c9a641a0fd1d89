//! `antefix stream`: a trained streaming model (docs/aaren.md) over events, one a line, in constant memory.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use antefix_papers::aaren::file::LONGEST;
use antefix_papers::aaren::{Mixer, Model, Session};
use anyhow::{Context, anyhow};

use crate::failure::Failure;

/// The longest line, bytes.
const LINE: usize = 1 << 20;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// The model, a `.safetensors` file of the format `antefix aaren 1`
    model: PathBuf,
    /// Go on from this state if the file is there, and save the state to it at the end
    #[arg(long, value_name = "FILE")]
    state: Option<PathBuf>,
    /// Save the state after every so many events, too
    #[arg(long, value_name = "EVENTS", requires = "state")]
    save_every: Option<std::num::NonZeroU64>,
    /// Report broken lines and go on, instead of stopping at the first
    #[arg(long)]
    skip_broken: bool,
}

/// Somebody pressed Ctrl-C: the state is saved behind the line that is being answered.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let bytes = bounded(&args.model, LONGEST)?;
    let of = |file: &Path| format!("`{}` is no model of this kind", file.display());
    let model = Model::read(&bytes)
        .with_context(|| of(&args.model))
        .map_err(Failure::Input)?;
    drop(bytes);
    if args.state.is_some() && model.config().mixer == Mixer::Attention {
        return Err(Failure::Input(anyhow!(
            "`--state`: the state of this model grows with every event and is not saved: its mixer is `attention`"
        )));
    }
    let saved = args.state.as_deref().filter(|file| file.exists());
    let mut session = match saved {
        Some(file) => {
            let bytes = bounded(file, LONGEST)?;
            Session::load(&model, &bytes)
                .with_context(|| format!("`{}` is no state of this model", file.display()))
                .map_err(Failure::Input)?
        }
        None => Session::new(&model),
    };
    ctrlc::set_handler(|| {
        // The second time somebody means it.
        if INTERRUPTED.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
    })
    .map_err(Failure::other)?;
    let done = answer(args, &mut session);
    // Whatever ended the stream, what was answered is kept.
    if let Some(file) = &args.state {
        save(&session, file)?;
    }
    done
}

fn answer(args: &Args, session: &mut Session<'_>) -> Result<(), Failure> {
    let mut input = BufReader::new(std::io::stdin().lock());
    let mut output = std::io::BufWriter::new(std::io::stdout().lock());
    let (mut line, mut number) = (Vec::new(), 0u64);
    while !INTERRUPTED.load(Ordering::Relaxed) {
        // Nobody waits for an answer that lies in a buffer.
        if input.buffer().is_empty() {
            output.flush()?;
        }
        line.clear();
        let read = (&mut input).take(LINE as u64 + 1).read_until(b'\n', &mut line)?;
        if read == 0 {
            break;
        }
        number += 1;
        let said = if read > LINE && line.last() != Some(&b'\n') {
            skip(&mut input)?;
            Err(format!("it has more than {LINE} bytes"))
        } else {
            match std::str::from_utf8(&line) {
                Ok(text) if text.trim().is_empty() => continue,
                Ok(text) => session.feed(text.trim()).map_err(|e| e.to_string()),
                Err(_) => Err("it is not UTF-8".into()),
            }
        };
        match said {
            Ok(said) => writeln!(output, "{said}")?,
            Err(what) if args.skip_broken => eprintln!("antefix: line {number}: {what}"),
            Err(what) => {
                output.flush()?;
                return Err(Failure::Input(anyhow!("line {number}: {what}")));
            }
        }
        if let (Some(every), Some(file)) = (args.save_every, &args.state)
            && session.state().seen().is_multiple_of(every.get())
        {
            save(session, file)?;
        }
    }
    output.flush()?;
    Ok(())
}

/// Drops the rest of a line that is too long.
fn skip(input: &mut impl BufRead) -> Result<(), Failure> {
    loop {
        let buffer = input.fill_buf()?;
        if buffer.is_empty() {
            return Ok(());
        }
        match buffer.iter().position(|b| *b == b'\n') {
            Some(at) => {
                input.consume(at + 1);
                return Ok(());
            }
            None => {
                let all = buffer.len();
                input.consume(all);
            }
        }
    }
}

/// A file of at most `most` bytes.
fn bounded(file: &Path, most: u64) -> Result<Vec<u8>, Failure> {
    let mut bytes = Vec::new();
    let read = std::fs::File::open(file).and_then(|f| f.take(most + 1).read_to_end(&mut bytes));
    read.with_context(|| format!("`{}` cannot be read", file.display()))
        .map_err(Failure::Input)?;
    Ok(bytes)
}

/// Written beside the file and renamed, so that a crash leaves the old state.
fn save(session: &Session<'_>, file: &Path) -> Result<(), Failure> {
    let bytes = session.save().map_err(Failure::other)?;
    let mut beside = file.as_os_str().to_owned();
    beside.push(".new");
    std::fs::write(&beside, bytes)
        .and_then(|()| std::fs::rename(&beside, file))
        .with_context(|| format!("`{}` cannot be written", file.display()))
        .map_err(Failure::Other)
}
