//! From a request to a job that can run: methods rewrite the prompt and hang their hooks before anything is checked.

use std::ops::Range;
use std::sync::Arc;

use antefix_attention::hooks::{HookPlan, HookSpec, Observer, Sources};
use antefix_attention::method::{Card, Need, Program, Prompt};

use crate::engine::Engine;
use crate::job::{Job, JobError, RawJob};
use crate::tail::Tail;

/// Bytes that the captures of a method's own hooks may take.
const CAPTURE_BYTES: usize = 256 << 20;

impl Engine {
    /// Checks a request, after its methods have rewritten its prompt and hung their hooks.
    ///
    /// # Errors
    /// See [`JobError`].
    pub fn job(&self, mut raw: RawJob) -> Result<Job, JobError> {
        let prompt = Prompt {
            tokens: std::mem::take(&mut raw.tokens),
            documents: std::mem::take(&mut raw.documents),
        };
        if !prompt.is_sound() {
            return Err(JobError::Documents);
        }
        let before = prompt.tokens.len();
        let vocab = self.model().spec().vocab;
        let Some(program) = raw.program.clone() else {
            raw.tokens = prompt.tokens;
            return Job::new(raw, vocab, self.context());
        };
        let needs = |card: &&Card| card.needs.contains(&Need::Documents) && prompt.documents.is_empty();
        if let Some(card) = program
            .methods()
            .iter()
            .map(|(_, knobs)| knobs.card())
            .find(needs)
        {
            return Err(JobError::NoDocuments {
                method: card.name,
                hint: "`--document FILE` on the command line, `antefix.documents` over HTTP",
            });
        }
        let prompt = program.rewrite(prompt, &**self.tokenizer());
        let behind_documents = prompt.documents.last().map(|last| last.end);
        let decide_at = behind_documents
            .filter(|_| raw.question_after_cut)
            .unwrap_or(prompt.tokens.len());
        raw.tokens = prompt.tokens;
        if let Some(own) = &raw.hooks {
            own.set_prompt(raw.tokens.len());
        }
        let saved = saved(&raw, &program, &prompt.documents)?;
        let sight = program.policy().and_then(|policy| policy.sight(decide_at));
        let layers = self.model().spec().layers;
        let tail = sight.filter(|s| s.queries > 0).map(|s| {
            let rows = s.queries.min(decide_at);
            Arc::new(Tail::new(rows, decide_at, layers))
        });
        self.hang_hooks(&mut raw, &program, tail.as_ref())?;
        let context = self.context_with(&program).saturating_add(saved);
        let mut job = Job::new(raw, vocab, context)?;
        if program.chunk_use().is_some() {
            job.documents = prompt.documents;
        }
        job.prompt_before = before;
        job.decide_at = decide_at;
        job.tail = tail;
        Ok(job)
    }

    /// Adds the hooks of `program` to those that the request has itself.
    fn hang_hooks(
        &self,
        raw: &mut RawJob,
        program: &Program,
        tail: Option<&Arc<Tail>>,
    ) -> Result<(), JobError> {
        if !program.has_hooks() && tail.is_none() {
            return Ok(());
        }
        if raw.hooks.is_some() && program.has_hooks() {
            return Err(JobError::HooksTwice {
                method: program.name(),
            });
        }
        let observer = match raw.hooks.take() {
            Some(own) => own,
            None => Arc::new(match program.observer(raw.tokens.len(), CAPTURE_BYTES) {
                Some(observer) => observer,
                None => {
                    let shape = self.model().hook_shape();
                    let nothing = HookPlan::compile(&HookSpec::default(), shape, &Sources::default());
                    let nothing = nothing.map_err(|e| JobError::Hooks(e.to_string()))?;
                    Observer::new(Arc::new(nothing), raw.tokens.len(), 0)
                }
            }),
        };
        if let Some(tail) = tail {
            observer.add(tail.hook());
        }
        raw.hooks = Some(observer);
        Ok(())
    }
}

/// Tokens whose positions are used more than once, because documents stand side by side: so many more fit into the context.
fn saved(raw: &RawJob, program: &Program, documents: &[Range<usize>]) -> Result<usize, JobError> {
    let (Some(how), Some(first), Some(last)) = (program.chunk_use(), documents.first(), documents.last())
    else {
        return Ok(0);
    };
    let method = || program.name();
    if first.start == 0 || last.end >= raw.tokens.len() {
        return Err(JobError::Bare { method: method() });
    }
    for (asked, what) in [
        (raw.prompt_logprobs, "log-probabilities of the prompt"),
        (raw.hooks.is_some(), "its activations"),
    ] {
        if asked {
            return Err(JobError::NotComputed {
                method: method(),
                what,
            });
        }
    }
    let ends = documents.iter().skip(1).map(|d| d.start).chain([last.end]);
    let sizes: Vec<usize> = documents.iter().zip(ends).map(|(d, end)| end - d.start).collect();
    let next = how.layout(first.start, &sizes).next as usize;
    Ok(last.end.saturating_sub(next))
}
