//! [`Lab`] over the engine and the other instruments of this crate.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use antefix_attention::method::{DENSE, Facts, Profiles, Program, RawMethods, Rig, Trust};
use antefix_kv::Pool;
use antefix_papers::ALL;
use antefix_papers::act::sinks::Rule;
use antefix_papers::heads::{HeadProfile, HeadTest};
use antefix_papers::repro::{
    Belief, Drawn, HeadSearch, Lab, LabError, Library, Masked, PROFILE, Passages, Prefill, Quiz, Recall,
    Reuse, Stretch, Together, Way, mean,
};
use antefix_papers::retrieval_heads::mask::Mask;

use super::text::text;
use crate::eval::{self, Cell, EvalError, Plan, Row, Runner, Setting};
use crate::heads::{self, HeadsError, MaskCurve, NeedleRuns, Pattern, Search, Subject};
use crate::host::EngineHost;
use crate::reuse::{self, Sizes};
use crate::sparse_decode::{self, Draws};
use crate::tasks::{Kit, Prose, Task};
use crate::{likelihood, median, sparse, together};

/// Where needles stand when heads are measured.
const DEPTHS: [f64; 5] = [0.0, 0.25, 0.5, 0.75, 1.0];
/// Part of a sink's weight that it keeps while heads are searched for (paper `act`).
const BETA: f32 = 0.4;

/// Instruments on one model.
pub struct Bench {
    subject: Subject,
    facts: Facts,
    prose: Prose,
    /// Holds `heads/repro.json`; removed with this.
    folder: PathBuf,
    profile: HeadProfile,
    measured: Vec<(HeadSearch, HeadTest)>,
}

impl Bench {
    /// Instruments on `subject`; filler and texts out of `prose`.
    pub fn new(subject: Subject, prose: Prose) -> Self {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("antefix-repro-{}-{number}", std::process::id());
        Self {
            facts: subject.model.facts(),
            profile: subject.profile(),
            folder: std::env::temp_dir().join(name),
            measured: Vec::new(),
            subject,
            prose,
        }
    }

    /// The model.
    pub fn subject(&self) -> &Subject {
        &self.subject
    }

    /// The model's name.
    pub fn model_name(&self) -> &str {
        &self.subject.name
    }

    /// Where the profile of heads lies, once there is one.
    #[cfg(test)]
    pub(super) fn folder(&self) -> &std::path::Path {
        &self.folder
    }

    fn profiles(&self) -> Profiles {
        Profiles::named_in(vec![self.folder.clone()]).or_paths()
    }

    fn program(&self, way: Way<'_>) -> Result<Option<Arc<Program>>, LabError> {
        let mut raw = RawMethods::default();
        for text in way {
            raw.add(ALL, text).map_err(failed)?;
        }
        let chosen = raw.resolve(ALL, Trust::Local).map_err(failed)?;
        if chosen.is_empty() {
            return Ok(None);
        }
        let program = Rig::assemble(&self.facts, &self.profiles(), &chosen).map_err(unfit)?;
        Ok(Some(Arc::new(program)))
    }

    /// A program for every way, none of them dense attention.
    fn programs(&self, ways: &[Way<'_>]) -> Result<Vec<Arc<Program>>, LabError> {
        let planned = |way: &Way<'_>| {
            let program = self.program(way)?;
            program.ok_or_else(|| failed("dense attention plans nothing"))
        };
        ways.iter().map(planned).collect()
    }

    fn keep(&mut self, search: &HeadSearch, test: HeadTest) -> Result<(), LabError> {
        self.profile.put(test.clone());
        let search = HeadSearch {
            kind: name_of(&test.name, search.kind),
            ..search.clone()
        };
        self.measured.push((search, test));
        let folder = self.folder.join("heads");
        std::fs::create_dir_all(&folder).map_err(failed)?;
        let text = serde_json::to_string(&self.profile).map_err(failed)?;
        std::fs::write(folder.join(format!("{PROFILE}.json")), text).map_err(failed)
    }

    /// `length` tokens of real text.
    fn text(&self, length: usize) -> Result<Vec<u32>, LabError> {
        let context = self.subject.model.spec().context;
        if length > context {
            let why = format!("its context holds {context} tokens, {length} are asked for");
            return Err(LabError::Model(why));
        }
        text(&self.subject.tokenizer, &self.prose, length).map_err(failed)
    }

    fn kit(&self, digits: u32) -> Kit<'_> {
        Kit {
            tokenizer: &self.subject.tokenizer,
            prose: &self.prose,
            digits,
            shots: 0,
        }
    }

    /// Tokens of the longest prompt: methods may write one twice.
    fn room(length: usize) -> usize {
        length * 2 + 256
    }
}

fn recall(rows: &[Row]) -> Recall {
    Recall {
        n: rows.iter().map(|r| r.n).sum(),
        accuracy: mean(rows.iter().map(|r| r.accuracy)),
        kept: mean(rows.iter().map(|r| r.kept)),
        ttft_s: median(&rows.iter().map(|r| r.ttft_s).collect::<Vec<_>>()),
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        // Nothing there if no head was measured.
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

fn needle_runs(search: &HeadSearch) -> NeedleRuns {
    NeedleRuns {
        lengths: search.lengths.to_vec(),
        depths: DEPTHS.to_vec(),
        runs: search.runs,
        seed: search.seed,
    }
}

/// The measurement's own name as a kind: one search may make two.
fn name_of(name: &str, kind: &'static str) -> &'static str {
    match name {
        "retrieval" => "retrieval",
        "semantic" => "semantic",
        _ => kind,
    }
}

fn failed(error: impl std::fmt::Display) -> LabError {
    LabError::Failed(error.to_string())
}

fn unfit(error: impl std::fmt::Display) -> LabError {
    LabError::Model(error.to_string())
}

fn of_heads(error: HeadsError) -> LabError {
    match error {
        HeadsError::NoRuns(_) | HeadsError::Length { .. } => unfit(error),
        _ => failed(error),
    }
}

fn of_eval(error: EvalError) -> LabError {
    match error {
        EvalError::Task(_) | EvalError::Job(_) => unfit(error),
        _ => failed(error),
    }
}

impl Lab for Bench {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn recall(&mut self, quiz: &Quiz, ways: &[Way<'_>]) -> Result<Vec<Recall>, LabError> {
        let plan = Plan {
            tasks: vec![quiz.task.parse().map_err(failed)?],
            lengths: vec![quiz.length],
            depths: quiz.depths.to_vec(),
            samples: quiz.samples,
            seed: quiz.seed,
        };
        let programs = ways
            .iter()
            .map(|way| self.program(way))
            .collect::<Result<Vec<_>, _>>()?;
        let setting = Setting {
            name: &self.subject.name,
            context: Self::room(quiz.length),
            kept_prompts: if quiz.reuse_prompts { quiz.samples } else { 0 },
            question_after_cut: quiz.question_after_cut,
        };
        let (kit, subject) = (self.kit(quiz.digits), &self.subject);
        let mut runner = Runner::new(&subject.model, &subject.tokenizer, &setting, &programs);
        let mut found = vec![Vec::new(); programs.len()];
        for cell in plan.cells() {
            for (program, found) in programs.iter().zip(&mut found) {
                runner.under(program.clone());
                found.extend(eval::run(&cell, &kit, &mut runner, &[], |_| Ok(())).map_err(of_eval)?);
            }
        }
        Ok(found.iter().map(|rows| recall(rows)).collect())
    }

    fn beliefs(&mut self, quiz: &Quiz, ways: &[Way<'_>]) -> Result<Vec<Vec<Belief>>, LabError> {
        let task: Task = quiz.task.parse().map_err(failed)?;
        let depths = if task.has_depth() { quiz.depths } else { &[0.5] };
        let programs = ways
            .iter()
            .map(|way| self.program(way))
            .collect::<Result<Vec<_>, _>>()?;
        let (model, tokenizer) = (&self.subject.model, &self.subject.tokenizer);
        let mut host = EngineHost::with_room(
            model,
            tokenizer,
            Self::room(quiz.length),
            (ALL, Profiles::default()),
        );
        let mut out = vec![Vec::new(); ways.len()];
        for &depth in depths {
            let cell = Cell {
                task,
                length: quiz.length,
                depth,
                samples: quiz.samples,
                seed: quiz.seed,
                question_after_cut: quiz.question_after_cut,
            };
            let found = eval::beliefs(&mut host, &self.kit(quiz.digits), &cell, &programs).map_err(unfit)?;
            out.iter_mut()
                .zip(found)
                .for_each(|(out, found)| out.extend(found));
        }
        Ok(out)
    }

    fn likelihood(&mut self, text: &Passages, ways: &[Way<'_>]) -> Result<Vec<Vec<Stretch>>, LabError> {
        ways.iter()
            .map(|way| {
                let program = self.program(way)?;
                let subject = (&self.subject.model, &*self.subject.tokenizer);
                likelihood::by_position(subject, &self.prose, text, program.as_deref()).map_err(failed)
            })
            .collect()
    }

    fn reuse(&mut self, library: &Library, methods: &[&str]) -> Result<Vec<Reuse>, LabError> {
        let sizes = Sizes {
            documents: library.documents,
            tokens: library.tokens,
            question: library.question,
            answer: library.answer,
        };
        let mut ways = vec![reuse::Way::Full, reuse::Way::Prefix];
        for &name in methods {
            let program = self.program(&[name])?;
            let how = program.as_ref().and_then(|p| p.chunk_use()).cloned();
            ways.push(reuse::Way::Reuse {
                name: name.to_string(),
                how: how.ok_or_else(|| failed(format!("`{name}` does not reuse documents")))?,
            });
        }
        let model = &self.subject.model;
        let all = sizes.documents * sizes.tokens + sizes.question + sizes.answer + 64;
        let room = Pool::new(model.kv_shape(), 0).bytes_for(all) * 5;
        let fingerprint = antefix_engine::identity(model).map_err(failed)?.fingerprint();
        let mut bench = reuse::Bench::new(Arc::clone(model), room, fingerprint, None);
        let rows = bench
            .compare(
                &self.subject.tokenizer,
                sizes,
                &ways,
                (library.prompts, library.seed),
            )
            .map_err(failed)?;
        let of = |r: reuse::Row| Reuse {
            way: r.way,
            tokens: r.tokens,
            ttft_s: r.ttft_s,
            speedup: r.speedup,
            end_s: r.end_s,
            end_speedup: r.end_speedup,
            kl: r.kl,
            top1: r.top1,
        };
        Ok(rows.into_iter().map(of).collect())
    }

    fn heads(&mut self, search: &HeadSearch) -> Result<HeadTest, LabError> {
        if let Some((_, test)) = self.measured.iter().find(|(s, _)| s == search) {
            return Ok(test.clone());
        }
        let (runs, length) = (search.runs, search.lengths[0]);
        let tests = match search.kind {
            "retrieval" | "semantic" => {
                heads::retrieval(&self.subject, &needle_runs(search), Vec::new(), &mut |_| {})
                    .map_err(of_heads)?
                    .to_vec()
            }
            "act" => {
                let how = Search {
                    examples: runs,
                    length,
                    seed: search.seed,
                    beta: BETA,
                };
                vec![heads::calibration(&self.subject, &how, Rule::PAPER, &mut |_| {}).map_err(of_heads)?]
            }
            kind => {
                let kind: Pattern = kind.parse().map_err(failed)?;
                let seeds = search.seed..search.seed + runs as u64;
                vec![heads::pattern(&self.subject, kind, length, seeds).map_err(of_heads)?]
            }
        };
        let asked = tests.iter().find(|t| t.name == search.kind).cloned();
        for test in tests {
            self.keep(search, test)?;
        }
        asked.ok_or_else(|| failed(format!("`{}` was not measured", search.kind)))
    }

    fn mask(
        &mut self,
        test: &HeadTest,
        search: &HeadSearch,
        counts: &[usize],
        draws: usize,
    ) -> Result<Vec<Masked>, LabError> {
        let curve = MaskCurve {
            runs: needle_runs(search),
            counts: counts.to_vec(),
            draws,
            mode: Mask::Uniform,
        };
        let points = heads::masking(&self.subject, test, &curve, &mut |_| {}).map_err(of_heads)?;
        let mut out: Vec<(Masked, Vec<f64>)> = Vec::new();
        for point in points {
            let same = |m: &&mut (Masked, Vec<f64>)| m.0.which == point.which && m.0.heads == point.heads;
            if let Some((_, recalls)) = out.iter_mut().find(same) {
                recalls.push(point.recall);
                continue;
            }
            let masked = Masked {
                which: point.which,
                heads: point.heads,
                recall: 0.0,
            };
            out.push((masked, vec![point.recall]));
        }
        let averaged = |(masked, recalls): (Masked, Vec<f64>)| Masked {
            recall: mean(recalls),
            ..masked
        };
        Ok(out.into_iter().map(averaged).collect())
    }

    fn together(&mut self, prefix: usize, batch: usize, steps: usize) -> Result<Together, LabError> {
        together::together(&self.subject.model, prefix, batch, steps).map_err(unfit)
    }

    fn prefill(&mut self, length: usize, rows: usize, ways: &[Way<'_>]) -> Result<Vec<Prefill>, LabError> {
        let tokens = self.text(length)?;
        let programs = self.programs(ways)?;
        let mut found = Vec::with_capacity(1 + ways.len());
        sparse::compare(&self.subject.model, &tokens, &programs, rows, |row| {
            found.push(row)
        })
        .map_err(failed)?;
        let of = |(method, r): (String, sparse::SparseRow)| Prefill {
            method,
            length: r.length,
            ttft_s: r.ttft_s,
            attn_s: r.attn_s,
            plan_s: r.plan_s,
            density: r.density,
            recall: r.recall.unwrap_or(1.0),
            kl: r.kl,
            top1: r.top1,
        };
        Ok(names(ways).zip(found).map(of).collect())
    }

    fn drawn(
        &mut self,
        length: usize,
        steps: usize,
        batches: &[usize],
        ways: &[Way<'_>],
    ) -> Result<Vec<Drawn>, LabError> {
        let tokens = self.text(length)?;
        let programs = self.programs(ways)?;
        let mut found = Vec::with_capacity(batches.len() * (1 + ways.len()));
        let model = &self.subject.model;
        let draws = Draws {
            steps,
            batches,
            shared: false,
        };
        sparse_decode::decode(model, &tokens, draws, &programs, |row| found.push(row)).map_err(failed)?;
        let names = batches.iter().flat_map(|_| names(ways));
        Ok(names
            .zip(found)
            .map(|(method, row)| Drawn { method, ..row })
            .collect())
    }
}

/// What the rows of dense attention and of `ways` are called.
fn names<'a>(ways: &'a [Way<'_>]) -> impl Iterator<Item = String> + 'a {
    [DENSE.to_string()]
        .into_iter()
        .chain(ways.iter().map(|way| way.concat()))
}
