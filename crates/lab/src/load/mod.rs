//! Load on a server: what many people ask, how long they wait, and what that does to each other.
//!
//! Everything here is a client: it knows OpenAI's HTTP API and nothing of the server behind it.

mod client;
mod fairness;
mod isolation;
mod run;
mod soak;
mod stats;
mod traffic;

pub use client::{Api, Asked, LoadError, Message, Target};
pub use fairness::{Fairness, FairnessPlan, fairness};
pub use isolation::{Isolation, IsolationPlan, isolation};
pub use run::{Arrivals, Limits, LoadRow, Plan, run};
pub use soak::{Slopes, SoakPlan, SoakSample, slopes, soak};
pub use stats::{Spread, auc, slope};
pub use traffic::{Conversation, Kind, Shape, conversation};
