//! Jobs, sequences, batches: the scheduler, the sampler and the loop that runs a model.
//!
//! The engine never blocks and owns no thread: [`Engine::step`] runs one batch and reports what happened through events.

mod again;
mod cache;
mod constraint;
mod course;
mod engine;
mod job;
mod pace;
mod prepare;
mod rescue;
mod reuse;
mod sampler;
mod schedule;
mod session;
mod stop;
mod tail;

pub use antefix_kv::Keep;
pub use cache::{CacheOptions, CacheStats, IdentityError, PinError, Whereabouts, identity};
pub use constraint::{BoxedConstraint, Constraint, ConstraintFailed};
pub use course::{MethodReport, PlanReport};
pub use engine::{Done, Engine, EngineError, Event, Load, Options, PromptLogprob, StepReport, Usage};
pub use job::{Job, JobError, MAX_TOP_LOGPROBS, Pooling, RawJob};
pub use pace::{Pace, Work};
pub use reuse::{Library, Provenance, ReuseError};
pub use sampler::{RawSampling, Sampler, Sampling, SamplingError, argmax, log_softmax_at};
pub use schedule::{Batch, Beside, Budget, Part, SeqId, SeqView, WaitView, next_in_line, schedule};
pub use session::{NotForTexts, Session};
