//! Tasks whose answers a text holds: what a long-context method must not lose.
//!
//! The kinds follow RULER (Hsieh et al., 2024) in idea; texts, names and wording are our own. A [`Sample`] is a context and a question behind
//! it, so that a cache policy can be applied between the two. The length of a prompt is counted in tokens of the model at hand.

mod lists;
mod needle;
mod prose;

use std::ops::Range;
use std::str::FromStr;

use antefix_models::tokenizer::{Specials, Tokenizer};

pub use needle::{NEEDLES, Needle, needle_run};
pub use prose::Prose;

/// One question with everything that is needed to ask and to mark it.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// The text, with the begin-of-text token where the model has one.
    pub context: Vec<u32>,
    /// What follows it, up to where the answer begins.
    pub question: Vec<u32>,
    /// What the answer must contain; several for tasks with several values.
    pub answers: Vec<String>,
    /// Tokens of the answer at most.
    pub max_tokens: usize,
    /// Where in the context the facts stand that answer the question (tokens).
    pub facts: Vec<Range<usize>>,
    /// Parts of the context that methods may take for documents; none: all of it is one.
    pub parts: Vec<Range<usize>>,
}

impl Sample {
    /// Context and question.
    pub fn prompt(&self) -> Vec<u32> {
        [self.context.as_slice(), &self.question].concat()
    }

    /// Where the documents of [`Sample::prompt`] lie. The first token may be the model's begin-of-text token, which belongs to none.
    pub fn documents(&self) -> Vec<Range<usize>> {
        if !self.parts.is_empty() {
            return self.parts.clone();
        }
        let start = usize::from(self.context.len() > 1);
        std::iter::once(start..self.context.len())
            .filter(|d| !d.is_empty())
            .collect()
    }

    /// The fraction of the answers that occur in `text`, case ignored (RULER's string match).
    pub fn mark(&self, text: &str) -> f64 {
        let text = text.to_lowercase();
        let found = self
            .answers
            .iter()
            .filter(|a| text.contains(&a.to_lowercase()))
            .count();
        found as f64 / self.answers.len().max(1) as f64
    }
}

/// What is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Task {
    /// One fact in filler text.
    Needle,
    /// One fact is asked for among several of the same form.
    NeedleKeys,
    /// One key has several values; all are asked for.
    NeedleValues,
    /// Which variables hold a value, through a chain of assignments.
    Variables,
    /// The words that occur most often in a list.
    CommonWords,
    /// The most frequent words of a coded text whose frequencies fall like 1/rank.
    FrequentWords,
    /// The value of a key in a long table.
    Lookup,
    /// A question whose answer needs two facts from two documents.
    TwoHop,
    /// The label of a text after many labelled examples.
    ManyShot,
    /// Repeat what came before a marker.
    Copy,
}

impl Task {
    /// All tasks, in the order of the documentation.
    pub const ALL: [Task; 10] = [
        Task::Needle,
        Task::NeedleKeys,
        Task::NeedleValues,
        Task::Variables,
        Task::CommonWords,
        Task::FrequentWords,
        Task::Lookup,
        Task::TwoHop,
        Task::ManyShot,
        Task::Copy,
    ];

    /// Its name on the command line and in results.
    pub fn name(self) -> &'static str {
        match self {
            Task::Needle => "needle",
            Task::NeedleKeys => "needle-keys",
            Task::NeedleValues => "needle-values",
            Task::Variables => "variables",
            Task::CommonWords => "common-words",
            Task::FrequentWords => "frequent-words",
            Task::Lookup => "lookup",
            Task::TwoHop => "two-hop",
            Task::ManyShot => "many-shot",
            Task::Copy => "copy",
        }
    }

    /// Whether the place of the fact can be chosen.
    pub fn has_depth(self) -> bool {
        matches!(self, Task::Needle | Task::NeedleKeys | Task::Lookup)
    }

    /// A sample of `length` tokens at most (question included, answer not).
    ///
    /// `depth`: where the asked fact stands, 0 = at the start, 1 = at the end of the context; tasks without a place ignore it.
    ///
    /// # Errors
    /// When the task does not fit into `length` tokens.
    pub fn sample(self, kit: &Kit<'_>, length: usize, depth: f64, seed: u64) -> Result<Sample, TaskError> {
        // Every task draws from a stream of its own: the needles of one do not depend on the filler of another.
        let mut rng = fastrand::Rng::with_seed(seed ^ ((self as u64 + 1) << 56));
        let depth = depth.clamp(0.0, 1.0);
        let sample = match self {
            Task::Needle => needle::numbers(kit, length, depth, (1, 1), &mut rng),
            Task::NeedleKeys => needle::numbers(kit, length, depth, (4, 1), &mut rng),
            Task::NeedleValues => needle::numbers(kit, length, depth, (1, 4), &mut rng),
            Task::Variables => lists::variables(kit, length, &mut rng),
            Task::CommonWords => lists::common_words(kit, length, &mut rng),
            Task::FrequentWords => lists::frequent_words(kit, length, &mut rng),
            Task::Lookup => lists::lookup(kit, length, depth, &mut rng),
            Task::TwoHop => lists::two_hop(kit, length, &mut rng),
            Task::ManyShot => lists::many_shot(kit, length, &mut rng),
            Task::Copy => lists::copy(kit, length, &mut rng),
        };
        sample
            .filter(|s| s.context.len() + s.question.len() <= length)
            .ok_or(TaskError::Short {
                task: self.name(),
                length,
            })
    }
}

impl FromStr for Task {
    type Err = TaskError;

    fn from_str(name: &str) -> Result<Self, TaskError> {
        Task::ALL
            .into_iter()
            .find(|t| t.name() == name)
            .ok_or_else(|| TaskError::Unknown(name.to_string()))
    }
}

/// Why there is no sample.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TaskError {
    /// No such task.
    #[error("`{0}` is not a task\nhint: {names}", names = Task::ALL.map(Task::name).join(", "))]
    Unknown(String),
    /// Too few tokens.
    #[error("`{task}` does not fit into {length} tokens\nhint: ask for a greater length")]
    Short {
        /// The task.
        task: &'static str,
        /// The length asked for.
        length: usize,
    },
}

/// What all samples of a run share.
#[derive(Clone, Copy)]
pub struct Kit<'a> {
    /// Counts and makes the tokens.
    pub tokenizer: &'a Tokenizer,
    /// Filler.
    pub prose: &'a Prose,
    /// Digits of the numbers that needles hide; 7 in RULER, fewer for small models.
    pub digits: u32,
    /// Tokens of a document of examples in `many-shot`: as many examples as fit stand in one, at least one.
    pub shots: usize,
}

impl Kit<'_> {
    fn encode(&self, text: &str) -> Vec<u32> {
        self.tokenizer.encode(text, Specials::Plain)
    }

    /// The begin-of-text token, where the model wants one.
    fn start(&self) -> Vec<u32> {
        self.tokenizer
            .bos()
            .filter(|_| self.tokenizer.add_bos())
            .into_iter()
            .collect()
    }

    /// A number of [`Kit::digits`] digits that is not in `taken`.
    fn number(&self, taken: &mut Vec<String>, rng: &mut fastrand::Rng) -> String {
        let digits = self.digits.clamp(1, 18);
        loop {
            let low = 10u64.pow(digits - 1);
            let number = rng.u64(low..low * 10).to_string();
            if !taken.contains(&number) {
                taken.push(number.clone());
                return number;
            }
            // One-digit numbers run out.
            if taken.len() as u64 >= low * 9 {
                return number;
            }
        }
    }
}

/// Lays sentences one behind the other and notes where the marked ones came to lie.
fn lay(mut context: Vec<u32>, sentences: &[(Vec<u32>, bool)]) -> (Vec<u32>, Vec<Range<usize>>) {
    let mut facts = Vec::new();
    for (tokens, is_fact) in sentences {
        let from = context.len();
        context.extend(tokens);
        if *is_fact {
            facts.push(from..context.len());
        }
    }
    (context, facts)
}

#[cfg(test)]
mod tests;
