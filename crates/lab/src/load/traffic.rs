//! What is asked: texts of plain words, decided by a seed.

use serde::{Deserialize, Serialize};

use super::client::Message;

/// What requests have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A few long system prompts, each before many short questions.
    PrefixRepetition,
    /// Conversations: each turn repeats all before it, conversations share nothing.
    MultiTurn,
    /// Long prompts that share nothing.
    Unique,
}

/// Sizes, in words; most vocabularies have one token for each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// Of a system prompt; of the user's turns of a conversation together; of a prompt that is unique.
    pub prefix: usize,
    /// Of a question behind a system prompt.
    pub suffix: usize,
    /// Number of system prompts.
    pub prefixes: usize,
    /// Turns of a conversation.
    pub turns: usize,
    /// Tokens of an answer.
    pub output: usize,
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            prefix: 2048,
            suffix: 64,
            prefixes: 4,
            turns: 4,
            output: 64,
        }
    }
}

/// What one person says: a system prompt, perhaps, and the turns, each after the answer to the one before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conversation {
    /// Before everything.
    pub system: Option<String>,
    /// The user's turns, at least one.
    pub turns: Vec<String>,
}

impl Conversation {
    /// The messages before the first answer.
    pub fn start(&self) -> Vec<Message> {
        let system = self.system.iter().map(|s| Message::new("system", s));
        system
            .chain(self.turns.first().map(|t| Message::new("user", t)))
            .collect()
    }
}

const WORDS: [&str; 64] = [
    "time", "people", "water", "house", "light", "world", "night", "small", "great", "place", "right",
    "story", "river", "table", "green", "music", "paper", "white", "young", "point", "black", "state",
    "under", "never", "after", "still", "again", "found", "every", "large", "group", "early", "power",
    "north", "south", "field", "money", "heart", "voice", "stone", "plant", "money", "horse", "order",
    "class", "short", "front", "level", "heavy", "clear", "human", "local", "ready", "floor", "space",
    "sound", "earth", "cause", "color", "sense", "chance", "market", "letter", "garden",
];

/// SplitMix64: one stream for each pair of a seed and a purpose.
struct Words(u64);

impl Words {
    fn new(seed: u64, purpose: u64) -> Self {
        let mut words = Self(seed ^ purpose.wrapping_mul(0xD1B5_4A32_D192_ED03));
        words.bits();
        words
    }

    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn text(&mut self, words: usize) -> String {
        let mut text = String::with_capacity(words * 7);
        for i in 0..words {
            if i > 0 {
                text.push(' ');
            }
            text.push_str(WORDS[(self.bits() % WORDS.len() as u64) as usize]);
        }
        text
    }
}

/// The `i`-th conversation under `seed`.
pub fn conversation(kind: Kind, shape: &Shape, seed: u64, i: u64) -> Conversation {
    // Kinds have streams of their own: a server that was asked one kind has cached nothing of another.
    let mut own = Words::new(seed, (i << 4) | ((kind as u64) << 2) | 1);
    match kind {
        Kind::PrefixRepetition => {
            let which = own.bits() % shape.prefixes.max(1) as u64;
            let system = Words::new(seed, which << 4).text(shape.prefix);
            Conversation {
                system: Some(system),
                turns: vec![own.text(shape.suffix)],
            }
        }
        Kind::MultiTurn => {
            let turns = shape.turns.max(1);
            Conversation {
                system: None,
                turns: (0..turns)
                    .map(|_| own.text((shape.prefix / turns).max(1)))
                    .collect(),
            }
        }
        Kind::Unique => Conversation {
            system: None,
            turns: vec![own.text(shape.prefix)],
        },
    }
}

/// Seconds between two arrivals of a Poisson process of `rate` a second: the `i`-th under `seed`.
pub(super) fn gap(rate: f64, seed: u64, i: u64) -> f64 {
    let bits = Words::new(seed, (i << 4) | 2).bits() >> 11;
    let uniform = (bits as f64 + 0.5) / (1u64 << 53) as f64;
    -uniform.ln() / rate
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_seed_decides_everything() {
        for kind in [Kind::PrefixRepetition, Kind::MultiTurn, Kind::Unique] {
            let shape = Shape::default();
            let ask = |seed, i| conversation(kind, &shape, seed, i);
            assert_eq!(ask(1, 5), ask(1, 5));
            assert_ne!(ask(1, 5), ask(2, 5));
            assert_ne!(ask(1, 5).turns, ask(1, 6).turns);
            let other = conversation(Kind::Unique, &shape, 1, 5).turns[0].clone();
            assert!(kind == Kind::Unique || !other.starts_with(&ask(1, 5).turns[0]));
        }
    }

    #[test]
    fn kinds_share_what_they_say() {
        let shape = Shape::default();
        let systems = |kind| {
            let mut all: Vec<_> = (0..100)
                .map(|i| conversation(kind, &shape, 3, i).system)
                .collect();
            all.sort();
            all.dedup();
            all
        };
        assert_eq!(systems(Kind::PrefixRepetition).len(), shape.prefixes);
        assert_eq!(systems(Kind::Unique), [None]);
        assert_eq!(
            conversation(Kind::MultiTurn, &shape, 3, 0).turns.len(),
            shape.turns
        );
    }

    #[test]
    fn arrivals_have_the_rate() {
        let mean = (0..10_000).map(|i| gap(4.0, 9, i)).sum::<f64>() / 10_000.0;
        assert!((mean - 0.25).abs() < 0.01, "{mean}");
    }
}
