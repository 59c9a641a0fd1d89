//! A request under way with its methods: its angles, and the moments at which its cache policy decides.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};

use antefix_attention::hooks::Told;
use antefix_attention::method::{Axis, CachePolicy, LayerView, Program};
use antefix_attention::sparse::Planning;
use antefix_attention::{Angles, ChunkUse, Extra};
use antefix_kernels::attend::PageLayout;
use antefix_kv::{Edit, EditError, LayerEdit, Policy, Pool, SeqState};
use antefix_models::decoder::Model;
use antefix_state::PAGE_ROWS;

use crate::job::Job;
use crate::reuse::Provenance;
use crate::tail::Tail;

/// What the methods of a request did.
#[derive(Debug, Clone, PartialEq)]
pub struct MethodReport {
    /// Names of the methods: `streaming_llm`, `jrt+compresskv`.
    pub method: String,
    /// The same with all settings.
    pub settings: String,
    /// Whether the answer is that of dense attention on the same prompt, bit for bit.
    pub exact: bool,
    /// Bytes of the pages that the request held at its end, over those that dense attention on the prompt as it was computed would have
    /// held. More than 1 where a method holds more: documents end in pages of their own, and their rows that were computed again
    /// lie beside the stored ones.
    pub kept: f64,
    /// Times that the cache was cut.
    pub edits: usize,
    /// If a planner chose the keys that rows read: what it kept.
    pub plan: Option<PlanReport>,
    /// Tokens of the prompt before methods rewrote it.
    pub prompt_before: usize,
    /// Where the rows of reused documents came from.
    pub documents: Option<Provenance>,
    /// What hooks tell of the rows that they saw.
    pub told: Vec<Told>,
}

/// What planners did for the rows that were computed, in the layers that they plan.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PlanReport {
    /// The method that planned the prompt, if one did.
    pub prefill: Option<&'static str>,
    /// The method that planned drawn tokens, if one did.
    pub decode: Option<&'static str>,
    /// Kept (query, key) pairs of the prompt over those of dense attention; `None` if it was dense.
    pub density: Option<f64>,
    /// The same of drawn tokens.
    pub decode_density: Option<f64>,
    /// Seconds that planning took.
    pub plan_s: f64,
    /// Bytes that planners kept of keys at the end, beside the pages.
    pub summary_bytes: usize,
    /// Drawn tokens whose rows were replaced by those of a dense prompt.
    pub corrected: usize,
}

/// The methods of one sequence at work. A sequence that lost its memory starts its course again and comes to the same state.
pub(crate) struct Course {
    program: Arc<Program>,
    /// Whether what it did is told.
    reported: bool,
    angles: Option<Arc<Angles>>,
    planning: Option<Planning>,
    /// Pairs of layer and KV head that are planned, and their pages: what is kept of keys is counted by these.
    planned: (usize, PageLayout),
    decider: Option<Decider>,
    /// Tokens of the prompt behind which the policy decides first.
    decide_at: usize,
    prompt: usize,
    /// Tokens whose rows are, or are to be, those of given ones: the prompt's, and behind it drawn ones that were corrected. What was
    /// decided here outlasts the loss of memory.
    given: usize,
    prompt_before: usize,
    edits: usize,
    documents: Option<Provenance>,
}

/// Why a policy's decision did not come about.
pub(crate) enum Undecided {
    /// There is no room for the rows that stay, which are written before the others are freed.
    Edit(EditError),
    /// The policy panicked, and nothing was done yet.
    Panicked,
}

struct Decider {
    policy: Arc<dyn CachePolicy>,
    tail: Option<Arc<Tail>>,
    /// Rows of the prompt whose queries it sees.
    queries: usize,
    tag: Policy,
    /// Where it decides next.
    next: usize,
}

impl Course {
    /// The course of `job`.
    pub(crate) fn new(model: &Model, job: &Job) -> Self {
        let (program, decide_at) = (Arc::clone(&job.program), job.decide_at);
        let decider = program.policy().and_then(|policy| {
            let sight = policy.sight(decide_at)?;
            Some(Decider {
                policy: Arc::clone(policy),
                tail: job.tail.clone(),
                queries: sight.queries.min(decide_at),
                tag: Policy::new(&program.tag()),
                next: decide_at,
            })
        });
        let rotation = program.rotation(job.tokens.len() + job.max_tokens);
        let full = (0..model.spec().layers).filter(|&layer| model.geometry(layer).window.is_none());
        let kv = model.kv_shape();
        Self {
            planned: (full.count() * kv.kv_heads, kv.layout()),
            angles: rotation.map(|r| model.angles(r)),
            planning: Planning::of(&program, job.tokens.len()),
            program,
            reported: job.reported,
            decider,
            decide_at,
            prompt: job.tokens.len(),
            given: job.tokens.len(),
            prompt_before: job.prompt_before,
            edits: 0,
            documents: None,
        }
    }

    /// How its documents are reused, and in whose name what becomes of them is approximate.
    pub(crate) fn reuse(&self) -> Option<(Arc<dyn ChunkUse>, Policy)> {
        let how = self.program.chunk_use()?;
        Some((Arc::clone(how), Policy::new(&self.program.tag())))
    }

    /// Its documents were found, computed or mended.
    pub(crate) fn note_documents(&mut self, provenance: Provenance) {
        self.documents = Some(provenance);
    }

    /// Begins again: everything that was decided is forgotten.
    pub(crate) fn restart(&mut self) {
        self.edits = 0;
        if let Some(planning) = &mut self.planning {
            planning.restart();
        }
        if let Some(decider) = &mut self.decider {
            decider.next = self.decide_at;
        }
    }

    /// Tokens that are computed as given ones: the prompt, and drawn ones that were corrected.
    pub(crate) fn given(&self) -> usize {
        self.given
    }

    /// Whether rows of drawn tokens are to be replaced by those of a dense prompt, now that a token was drawn and there are `tokens`: from
    /// which row on. Where that is follows from the number of tokens alone, whatever the steps in which they came.
    pub(crate) fn correct(&mut self, state: &SeqState, tokens: usize) -> Option<usize> {
        let every = self.program.correct_every()?.get();
        let drawn = tokens - self.prompt;
        let given = self.prompt + drawn - drawn % every;
        // Behind a cut rows are dense anyway.
        if given == self.given || !Extra::of(state).is_bare() {
            return None;
        }
        let from = std::mem::replace(&mut self.given, given);
        if let Some(planning) = &self.planning {
            planning.truncate(from);
        }
        Some(from)
    }

    /// The salt under which pages of this sequence may be shared.
    pub(crate) fn salted(&self, salt: u64) -> u64 {
        let salt = self.program.salted(salt);
        match &self.angles {
            None => salt,
            Some(angles) => angles.salted(salt),
        }
    }

    /// How many of the first `known` tokens may come out of the cache of prefixes: what a policy has to see is computed, and behind
    /// where it has decided nothing is exact. What was planned together is found together.
    pub(crate) fn cacheable(&self, known: usize) -> usize {
        let known = match &self.decider {
            None => known,
            // At least the last row is computed: the policy decides behind it.
            Some(decider) => known.min(self.decide_at - decider.queries.max(1)),
        };
        self.keepable(known)
    }

    /// How many of the first `tokens` tokens are what they are in every prompt that starts with them under the same salt: drawn ones are
    /// not under a planner, unless they were corrected behind a dense prompt; of a planned prompt whole stretches in whole pages are, of
    /// which none ended where a policy decides.
    pub(crate) fn keepable(&self, tokens: usize) -> usize {
        let Some(planning) = &self.planning else {
            return tokens;
        };
        match planning.grain() {
            None => tokens.min(self.given),
            Some(grain) => {
                let tokens = tokens.min(self.prompt).min(self.decide_at);
                // The least common multiple: a page has a power of two rows.
                let unit = grain.saturating_mul((PAGE_ROWS >> grain.trailing_zeros().min(31)).max(1));
                tokens - tokens % unit
            }
        }
    }

    /// How many rows of the prompt behind its first `at` a step computes that was meant to compute `rows` of `left`: under a planner
    /// whole stretches.
    pub(crate) fn whole(&self, at: usize, rows: usize, left: usize) -> usize {
        match &self.planning {
            Some(planning) if at < self.prompt => planning.whole(at, rows, left),
            _ => rows,
        }
    }

    /// Bytes that its planners need at most beside its pages, if it has `tokens` tokens.
    pub(crate) fn beside(&self, tokens: usize) -> usize {
        let (runs, layout) = self.planned;
        self.planning
            .as_ref()
            .map_or(0, |p| p.summary_bytes(tokens, runs, layout))
    }

    /// The position that no step may pass before the policy has decided.
    pub(crate) fn border(&self) -> usize {
        self.decider.as_ref().map_or(usize::MAX, |d| d.next)
    }

    /// What its rows bring to attention.
    pub(crate) fn extra<'a>(&'a self, state: &'a SeqState) -> Extra<'a> {
        Extra {
            angles: self.angles.as_deref(),
            // Corrections are dense.
            planning: self
                .planning
                .as_ref()
                .filter(|_| !(self.prompt..self.given).contains(&state.done())),
            ..Extra::of(state)
        }
    }

    /// Lets the policy decide if the sequence has come to where it does.
    ///
    /// # Errors
    /// See [`Undecided`].
    pub(crate) fn decide(
        &mut self,
        model: &Model,
        pool: &mut Pool,
        state: &mut SeqState,
    ) -> Result<(), Undecided> {
        let Some(decider) = &self.decider else {
            return Ok(());
        };
        if (state.next_pos() as usize) < decider.next {
            return Ok(());
        }
        let next = state.next_pos();
        let layers: Vec<Mutex<LayerEdit>> = (0..model.spec().layers)
            .map(|_| Mutex::new(LayerEdit::KeepAll))
            .collect();
        {
            let (state, pool): (&SeqState, &Pool) = (state, pool);
            let layer = |layer: usize| {
                let queries = decider
                    .tail
                    .as_ref()
                    .map_or_else(Vec::new, |tail| tail.window(layer, next));
                let edit = decider.policy.layer(&LayerView {
                    layer,
                    geometry: &model.geometry(layer),
                    first_cut: self.edits == 0,
                    next,
                    queries: &queries,
                    state,
                    pool,
                });
                *layers[layer].lock().unwrap_or_else(PoisonError::into_inner) = edit;
            };
            // Policies only look: there is nothing to take back.
            let asked = catch_unwind(AssertUnwindSafe(|| model.team().run(layers.len(), &layer)));
            asked.map_err(|_| Undecided::Panicked)?;
        }
        let unlock = |edit: Mutex<LayerEdit>| edit.into_inner().unwrap_or_else(PoisonError::into_inner);
        let layers: Vec<LayerEdit> = layers.into_iter().map(unlock).collect();
        let edit = Edit {
            policy: decider.tag.clone(),
            layers,
        };
        state.apply(pool, &edit).map_err(Undecided::Edit)?;
        if let Some(planning) = self.planning.as_ref().filter(|_| !Extra::of(state).is_bare()) {
            // Nothing is planned any more.
            planning.truncate(0);
        }
        self.edits += usize::from(edit.layers.iter().any(|l| *l != LayerEdit::KeepAll));
        let next = match decider.policy.every() {
            None => usize::MAX,
            // The tokens of a question that follows the first cut do not count.
            Some(n) => decider.next.max(self.prompt).saturating_add(n.get()),
        };
        if let Some(decider) = &mut self.decider {
            decider.next = next;
        }
        Ok(())
    }

    /// What the methods did; `None` if the request named none.
    pub(crate) fn report(&self, pool: &Pool, state: &SeqState) -> Option<MethodReport> {
        if !self.reported {
            return None;
        }
        let dense = pool.bytes_for(state.done());
        let held = state.context.page_count() * pool.shape().page_bytes() + pool.bytes_for(state.tail.len());
        Some(MethodReport {
            method: self.program.name(),
            settings: self.program.tag(),
            exact: self.program.is_exact(),
            kept: match dense {
                0 => 1.0,
                _ => held as f64 / dense as f64,
            },
            edits: self.edits,
            plan: self.planning.as_ref().map(|planning| PlanReport {
                prefill: self.program.on(Axis::Prefill),
                decode: self.program.on(Axis::Decode),
                density: planning.density(),
                decode_density: planning.decode_density(),
                plan_s: planning.time().as_secs_f64(),
                summary_bytes: planning.summary_bytes_now(),
                corrected: self.given - self.prompt,
            }),
            prompt_before: self.prompt_before,
            documents: self.documents.clone(),
            told: Vec::new(),
        })
    }
}
