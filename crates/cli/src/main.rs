//! The antefix command.

mod commands;
mod failure;
mod hooks;
mod method;
mod model;
mod telemetry;

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use failure::Failure;

/// Run language models on this machine's CPU: exact, fast, and the same answer whatever is cached.
#[derive(Parser)]
#[command(name = "antefix", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Answer one prompt; pulls the default model on first use
    Run(commands::run::Args),
    /// Talk to a model
    Chat(commands::chat::Args),
    /// Serve OpenAI's and Anthropic's APIs over HTTP
    Serve(commands::serve::Args),
    /// Measure prompt and decoding speed, alone and behind a shared prefix
    Bench(Box<commands::bench::Args>),
    /// Perplexity of a text file, with llama-perplexity's windowing
    Perplexity(commands::perplexity::Args),
    /// What a model finds in long texts: needles, variables, tables, by length and depth
    Eval(commands::eval::Args),
    /// What papers claim, measured again: figures and a verdict for each
    Repro(commands::repro::Args),
    /// Look inside: what heads read, which of them retrieve
    Analyse(commands::analyse::Args),
    /// Dictionaries of attention outputs: gather activations, train, measure, look at, attribute
    Sae(commands::sae::Args),
    /// Settings of a sparse method that meet a target on your own prompts, as a profile
    Tune(commands::tune::Args),
    /// Train what a recipe says: small models, adapters, policies
    Train(commands::train::Args),
    /// Raw logits of a prompt
    Logits(commands::logits::Args),
    /// Token ids of a text file
    Tokenize(commands::tokenize::Args),
    /// Text of token ids
    Detokenize(commands::tokenize::DetokenizeArgs),
    /// Look into, check or empty a folder of cached prefixes
    Cache(commands::cache::Args),
    /// Compute documents ahead, so that prompts find them
    Ingest(commands::ingest::Args),
    /// What reusing documents gains and loses on a model: time to the first token, distance from full prefill
    BlendCheck(commands::blend_check::Args),
    /// Follow a stream of events with a trained model, one JSON line in, one out, in constant memory
    Stream(commands::stream::Args),
    /// List, pull, show and remove models
    Models(commands::models::Args),
    /// The methods that `--method` takes, with their knobs
    Methods(commands::methods::Args),
    /// What would run: model facts, memory, kernels
    Explain(commands::explain::Args),
    /// What this machine can do, with measured ceilings
    Doctor(commands::doctor::Args),
    /// Completions for a shell, on standard output
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// The manual page, on standard output
    Man,
}

fn main() -> ExitCode {
    let cli = Cli::parse(); // exits with 2 on bad usage
    let done = match cli.command {
        Command::Run(args) => commands::run::run(args),
        Command::Chat(args) => commands::chat::run(args),
        Command::Serve(args) => commands::serve::run(args),
        Command::Bench(args) => commands::bench::run(&args),
        Command::Perplexity(args) => commands::perplexity::run(&args),
        Command::Eval(args) => commands::eval::run(&args),
        Command::Repro(args) => commands::repro::run(&args),
        Command::Analyse(args) => commands::analyse::run(&args),
        Command::Sae(args) => commands::sae::run(&args),
        Command::Tune(args) => commands::tune::run(&args),
        Command::Train(args) => commands::train::run(args),
        Command::Logits(args) => commands::logits::run(&args),
        Command::Tokenize(args) => commands::tokenize::run(&args),
        Command::Detokenize(args) => commands::tokenize::detokenize(&args),
        Command::Cache(args) => commands::cache::run(&args),
        Command::Ingest(args) => commands::ingest::run(&args),
        Command::BlendCheck(args) => commands::blend_check::run(&args),
        Command::Stream(args) => commands::stream::run(&args),
        Command::Models(args) => commands::models::run(args),
        Command::Methods(args) => commands::methods::run(&args),
        Command::Explain(args) => commands::explain::run(&args),
        Command::Doctor(args) => commands::doctor::run(&args),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "antefix", &mut std::io::stdout());
            Ok(())
        }
        Command::Man => man(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read our output has seen enough.
        Err(failure) if failure.is_closed_pipe() => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("antefix: {failure}");
            ExitCode::from(failure.code())
        }
    }
}

fn man() -> Result<(), Failure> {
    clap_mangen::Man::new(Cli::command())
        .render(&mut std::io::stdout())
        .map_err(Failure::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
