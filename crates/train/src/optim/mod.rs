//! Optimisers, schedules and the gradients they take.

mod adamw;
mod grads;
mod schedule;

pub use self::adamw::{AdamW, GroupRule, RawAdamW, RawGroup};
pub use self::grads::Grads;
pub use self::schedule::{RawSchedule, Schedule};
