//! retrieval_heads: the few heads that copy from the context into the answer.
//!
//! # What it does
//! Finds the heads whose largest weight stands on the very token of a hidden fact that is written next, while the fact is being written,
//! and ranks all heads by how much of the fact they copied. The same runs give the score of semantic retrieval heads, which `compresskv`
//! chooses by: the mass on the whole fact.
//!
//! # When it helps
//! Before a cache is compressed head by head (`razor_attention`, `compresskv`), and to find out whether an answer came from the context.
//! A model that does not answer from its context has no accepted run, and then there is no table.
//!
//! # Steps
//! 1. (2.1) A needle is hidden in prose and asked for; the place of its answer clause is known as tokens.
//! 2. (2.2) All of the prompt but its last token is computed as usual. Then at most 50 tokens are drawn greedily, and of every row of the
//!    step that produces a token `y` each head's largest key `j` is read: if `j` lies in the answer and holds `y`, the head gains
//!    1 / (length of the answer).
//! 3. (2.2) Runs count whose output has more than half of the answer's words; a head's score is its mean over them.
//! 4. (2.4) Heads are switched off while the answer is written, the best against as many others: what the best are good for.
//!
//! # Knobs
//! Those of `antefix analyse heads`: lengths, depths, runs, seed; `--mask-mode uniform` sets a head's query to zero, so that it reads all
//! keys evenly (the paper's program), `zero` its output.
//!
//! # Cost
//! One more product of queries and keys in each step that draws a token; the prompt costs nothing extra.
//!
//! # Differences from the paper
//! The needle's place is kept in tokens, not searched for in the text; no special tokens stand inside the text; needles, prose and
//! question are our own; words are not stemmed; the random heads really leave out the best ones (a tenth of all heads).
//!
//! # References
//! Wu et al., Retrieval Head Mechanistically Explains Long-Context Factuality, ICLR 2025, arXiv 2404.15574.

pub mod reference;
pub mod score;
#[cfg(test)]
mod tests;
