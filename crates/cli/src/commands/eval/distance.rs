//! `antefix eval kl` and `antefix eval ppl`.

use std::sync::Arc;

use antefix_attention::method::Program;
use antefix_lab::eval::{BeliefError, Cell, KlRow, Plan, beliefs, method_name};
use antefix_lab::host::EngineHost;
use antefix_lab::likelihood::{PplRow, by_position, of_answers};
use antefix_lab::perplexity::PerplexityError;
use antefix_lab::tasks::{Kit, Task};
use antefix_models::decoder::Model;
use antefix_models::tokenizer::Tokenizer;
use antefix_papers::ALL;
use antefix_papers::repro::Passages;

use super::Args;
use crate::commands::{json_line, line};
use crate::failure::Failure;
use crate::method::profiles;

/// What stands beside tasks.
pub(super) const KINDS: [&str; 2] = ["kl", "ppl"];
/// Stretches of a text whose perplexity is printed.
const STRETCHES: usize = 8;
/// Tokens that are scored as an answer at most: each is a step.
const SCORED: usize = 256;

/// A model, once under each of the programs; dense attention for `None`.
pub(super) struct Subject<'a> {
    pub(super) model: &'a Arc<Model>,
    pub(super) tokenizer: &'a Arc<Tokenizer>,
    pub(super) programs: &'a [Option<Arc<Program>>],
}

impl Subject<'_> {
    pub(super) fn run(&self, kind: &str, args: &Args, kit: &Kit<'_>, plan: &Plan) -> Result<(), Failure> {
        match kind {
            "kl" => self.kl(args, kit, plan),
            _ => self.ppl(args, kit, plan),
        }
    }

    fn host(&self, length: usize) -> Result<EngineHost, Failure> {
        // Methods may write a prompt twice.
        let room = length * 2 + SCORED;
        Ok(EngineHost::with_room(
            self.model,
            self.tokenizer,
            room,
            (ALL, profiles()?),
        ))
    }

    fn kl(&self, args: &Args, kit: &Kit<'_>, plan: &Plan) -> Result<(), Failure> {
        if !args.json {
            line(format_args!(
                "{:<6} {:>7} {:>6} {:>4} {:>9} {:>6} {:>8} {:>6}  method",
                "task", "length", "depth", "n", "KL nats", "top-1", "log p", "kept"
            ))?;
        }
        for &length in &plan.lengths {
            let mut host = self.host(length)?;
            for &depth in &plan.depths {
                let cell = Cell {
                    task: Task::Needle,
                    length,
                    depth,
                    samples: plan.samples,
                    seed: plan.seed,
                    question_after_cut: args.question_after_cut,
                };
                let found = beliefs(&mut host, kit, &cell, self.programs);
                let found = found.map_err(|e: BeliefError| Failure::input(e))?;
                for (program, beliefs) in self.programs.iter().zip(&found) {
                    let method = method_name(program.as_deref(), args.question_after_cut);
                    let row = KlRow::new(&method, &cell, beliefs);
                    match args.json {
                        true => json_line(&row)?,
                        false => line(format_args!(
                            "{:<6} {:>7} {:>6.2} {:>4} {:>9.4} {:>6.3} {:>8.3} {:>6.3}  {}",
                            row.task,
                            row.length,
                            row.depth,
                            row.n,
                            row.kl,
                            row.top1,
                            row.log_p,
                            row.kept,
                            row.method
                        ))?,
                    }
                }
            }
        }
        Ok(())
    }

    fn ppl(&self, args: &Args, kit: &Kit<'_>, plan: &Plan) -> Result<(), Failure> {
        if !args.json {
            line(format_args!(
                "{:<6} {:>7} {:>7} {:>7} {:>6} {:>10} {:>8} {:>6}  method",
                "task", "length", "from", "to", "n", "ppl", "nll", "kept"
            ))?;
        }
        for &length in &plan.lengths {
            for program in self.programs {
                for row in self.stretches(kit, plan, length, program.as_ref())? {
                    match args.json {
                        true => json_line(&row)?,
                        false => line(format_args!(
                            "{:<6} {:>7} {:>7} {:>7} {:>6} {:>10.4} {:>8.4} {:>6.3}  {}",
                            row.task,
                            row.length,
                            row.from,
                            row.to,
                            row.n,
                            row.ppl,
                            row.nll,
                            row.kept,
                            row.method
                        ))?,
                    }
                }
            }
        }
        Ok(())
    }

    /// By position where the methods can score a text; else the end of each text as an answer to its beginning.
    fn stretches(
        &self,
        kit: &Kit<'_>,
        plan: &Plan,
        length: usize,
        program: Option<&Arc<Program>>,
    ) -> Result<Vec<PplRow>, Failure> {
        let method = method_name(program.map(|p| &**p), false);
        let text = Passages {
            texts: plan.samples,
            length,
            step: length.div_ceil(STRETCHES).max(1),
            seed: plan.seed,
        };
        if program.is_none_or(|p| p.scores_texts()) {
            let found = by_position(
                (self.model, self.tokenizer),
                kit.prose,
                &text,
                program.map(|p| &**p),
            );
            let found = found.map_err(|e| match e {
                PerplexityError::Engine(_) => Failure::other(e),
                _ => Failure::input(e),
            })?;
            return Ok(found
                .iter()
                .map(|s| PplRow::new(&method, length, s, 1.0))
                .collect());
        }
        let scored = SCORED.min(length / 4);
        let mut host = self.host(length)?;
        let (stretch, kept) =
            of_answers(&mut host, kit.prose, &text, scored, program).map_err(Failure::input)?;
        Ok(vec![PplRow::new(&method, length, &stretch, kept)])
    }
}
