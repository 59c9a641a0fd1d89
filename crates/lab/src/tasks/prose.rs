//! Filler text: English prose about a small town, made sentence by sentence from a seed, or taken from a file.
//!
//! The sentences never name a number of more than two digits, a code, a secret or a key, so that nothing in them can be mistaken for
//! a needle.

use antefix_models::tokenizer::{Specials, Tokenizer};

/// Where filler comes from.
#[derive(Debug, Clone)]
pub enum Prose {
    /// Generated from the sample's seed.
    Generated,
    /// A text of the user's own; samples start at seeded offsets and wrap around.
    Text(String),
}

const PEOPLE: &[&str] = &[
    "the baker",
    "the schoolteacher",
    "an old fisherman",
    "the postmistress",
    "a young carpenter",
    "the doctor",
    "her grandmother",
    "the bell ringer",
    "a travelling painter",
    "the night watchman",
    "his cousin",
    "the librarian",
    "a retired sailor",
    "the miller",
    "the choir master",
    "an apprentice tailor",
    "the gardener",
    "two children",
    "the ferryman",
    "a visiting surveyor",
];
const PLACES: &[&str] = &[
    "the harbour",
    "the market square",
    "the stone bridge",
    "the mill pond",
    "the upper meadow",
    "the chapel",
    "the railway halt",
    "the orchard wall",
    "the tannery",
    "the old quarry",
    "the reading room",
    "the ferry landing",
    "the east road",
    "the cider press",
    "the school yard",
    "the lighthouse steps",
    "the rope walk",
    "the village inn",
];
const THINGS: &[&str] = &[
    "a basket of pears",
    "a folded newspaper",
    "three coils of rope",
    "a borrowed umbrella",
    "a jar of honey",
    "an unfinished letter",
    "a pair of mended boots",
    "the week's ledger",
    "a brass telescope",
    "a bundle of kindling",
    "a torn map",
    "a loaf still warm",
    "a box of seed potatoes",
    "a small accordion",
    "the parish register",
    "a lantern without oil",
    "a sack of barley",
];
const TIMES: &[&str] = &[
    "Early in the morning",
    "Towards evening",
    "On the first dry day of the month",
    "After the long rain",
    "Just before the frost",
    "At noon",
    "When the fair had ended",
    "In the quiet weeks of winter",
    "While the tide was out",
    "On market days",
    "Late in summer",
    "Before anyone else was awake",
    "During the second harvest",
    "When the wind turned",
];
const FEELINGS: &[&str] = &[
    "patient",
    "cheerful",
    "doubtful",
    "tired but content",
    "unusually silent",
    "proud",
    "curious",
    "stubborn",
    "grateful",
    "restless",
    "polite",
    "absent-minded",
    "impatient",
    "hopeful",
];
const WEATHER: &[&str] = &[
    "a thin mist lay over the fields",
    "the clouds moved in from the sea",
    "the air smelled of cut grass",
    "a warm wind dried the roofs",
    "the snow had begun to melt",
    "thunder could be heard behind the hills",
    "the river ran high and brown",
    "the first stars were already out",
    "the sun stood low above the chimneys",
    "hail rattled on the greenhouse",
];
const OPINIONS: &[&str] = &[
    "that repairs are cheaper than regrets",
    "that a road is only as good as its ditch",
    "that the old recipes were better",
    "that nobody should build on sand",
    "that children learn most outside",
    "that the council talked too much",
    "that good tools outlive their owners",
    "that music belongs in the open air",
    "that every fence needs a gate",
    "that the best bread needs a slow oven",
    "that letters should be answered the same day",
];

/// One sentence.
fn sentence(rng: &mut fastrand::Rng) -> String {
    fn one<'a>(rng: &mut fastrand::Rng, list: &[&'a str]) -> &'a str {
        list[rng.usize(..list.len())]
    }
    let (a, b) = (one(rng, PEOPLE), one(rng, PEOPLE));
    let (place, there) = (one(rng, PLACES), one(rng, PLACES));
    let (thing, time) = (one(rng, THINGS), one(rng, TIMES));
    let (feeling, weather, opinion) = (one(rng, FEELINGS), one(rng, WEATHER), one(rng, OPINIONS));
    let text = match rng.usize(..14) {
        0 => format!("{time}, {a} walked from {place} to {there} with {thing}."),
        1 => format!("{a} said {opinion}, and {b} looked {feeling}."),
        2 => format!("Near {place} {weather}, and {a} waited for {b}."),
        3 => format!("{time} {a} left {thing} at {place}, where {b} found it."),
        4 => format!("Nobody at {place} remembered who had brought {thing}."),
        5 => format!("{a} was {feeling} that day, because {weather}."),
        6 => format!("It took {a} most of the week to carry {thing} past {place}."),
        7 => format!("{time}, {weather}; at {place} the talk was of {thing}."),
        8 => format!("\"Have you seen {thing}?\" asked {a}, but {b} only shrugged."),
        9 => format!("{b} had always believed {opinion}, even at {place}."),
        10 => format!("From {place} one can see {there}, and sometimes {a} on the way home."),
        11 => format!("{a} and {b} agreed {opinion}, though they were both {feeling}."),
        12 => format!("There was little to do at {place}, so {a} counted the boats and grew {feeling}."),
        _ => format!("{time} {a} repaired the door of {place} and was paid with {thing}."),
    };
    capitalised(&text)
}

fn capitalised(text: &str) -> String {
    let at = text.find(|c: char| c.is_alphabetic()).unwrap_or(0);
    let (head, tail) = text.split_at(at);
    let mut chars = tail.chars();
    chars
        .next()
        .map(|c| format!("{head}{}{}", c.to_uppercase(), chars.as_str()))
        .unwrap_or_default()
}

impl Prose {
    /// Sentences, each with its leading space, that have `tokens` tokens together at most, and nearly so many.
    ///
    /// Empty for 0 tokens. The same `rng` state gives the same sentences.
    pub fn sentences(&self, tokenizer: &Tokenizer, tokens: usize, rng: &mut fastrand::Rng) -> Vec<Vec<u32>> {
        let encode = |s: &str| tokenizer.encode(&format!(" {s}"), Specials::Plain);
        let mut out = Vec::new();
        let mut left = tokens;
        let mut push = |ids: Vec<u32>| {
            let fits = ids.len() <= left;
            if fits {
                left -= ids.len();
                out.push(ids);
            }
            fits
        };
        match self {
            Prose::Generated => while push(encode(&sentence(rng))) {},
            Prose::Text(text) => {
                let all: Vec<&str> = text
                    .split_inclusive(['.', '!', '?'])
                    .map(str::trim)
                    .filter(|s| !s.is_empty())
                    .collect();
                if all.is_empty() {
                    return out;
                }
                let mut at = rng.usize(..all.len());
                while push(encode(&all[at].split_whitespace().collect::<Vec<_>>().join(" "))) {
                    at = (at + 1) % all.len();
                }
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_decides_and_nothing_looks_like_a_needle() {
        let make = |seed| {
            let mut rng = fastrand::Rng::with_seed(seed);
            (0..200).map(|_| sentence(&mut rng)).collect::<Vec<_>>()
        };
        assert_eq!(make(5), make(5));
        assert_ne!(make(5), make(6));
        for s in make(7) {
            assert!(s.ends_with(['.', '?']) || s.ends_with("shrugged."), "{s}");
            assert!(!s.contains(|c: char| c.is_ascii_digit()), "{s}");
            assert!(s.trim_start_matches('"').starts_with(char::is_uppercase), "{s}");
        }
    }
}
