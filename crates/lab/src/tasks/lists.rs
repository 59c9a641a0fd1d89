//! Tasks over lists, tables and documents.

use std::ops::Range;

use super::needle::name;
use super::{Kit, Sample, lay};

/// Everyday words of one or two tokens in most vocabularies.
const WORDS: &[&str] = &[
    "apple", "arrow", "basket", "beach", "bottle", "branch", "bridge", "butter", "button", "camera",
    "carpet", "castle", "cherry", "circle", "cloud", "coffee", "copper", "corner", "cotton", "desert",
    "dinner", "dragon", "engine", "fabric", "family", "farmer", "feather", "finger", "flower", "forest",
    "garden", "ginger", "glass", "guitar", "hammer", "harbor", "honey", "island", "jacket", "jungle",
    "kitchen", "ladder", "leather", "lemon", "letter", "library", "market", "meadow", "mirror", "monkey",
    "morning", "mountain", "museum", "needle", "ocean", "office", "orange", "palace", "paper", "pencil",
    "pepper", "pillow", "pocket", "potato", "prison", "rabbit", "ribbon", "river", "rocket", "salmon",
    "school", "shadow", "silver", "spider", "station", "stone", "sugar", "summer", "sunset", "tailor",
    "temple", "ticket", "tiger", "tomato", "tunnel", "turtle", "valley", "velvet", "village", "violin",
    "walnut", "window", "winter", "wizard", "yellow",
];

fn pick<'a>(list: &[&'a str], count: usize, rng: &mut fastrand::Rng) -> Vec<&'a str> {
    let mut list = list.to_vec();
    rng.shuffle(&mut list);
    list.truncate(count);
    list
}

/// Fills up `start` with sentences and puts `facts` among them in their order, at random places.
fn scatter(
    kit: &Kit<'_>,
    start: Vec<u32>,
    facts: &[Vec<u32>],
    room: usize,
    rng: &mut fastrand::Rng,
) -> Option<(Vec<u32>, Vec<std::ops::Range<usize>>)> {
    let used = start.len() + facts.iter().map(Vec::len).sum::<usize>();
    let filler = kit.prose.sentences(kit.tokenizer, room.checked_sub(used)?, rng);
    let mut places: Vec<usize> = facts.iter().map(|_| rng.usize(..=filler.len())).collect();
    places.sort_unstable();
    let mut sentences: Vec<(Vec<u32>, bool)> = filler.into_iter().map(|s| (s, false)).collect();
    for (fact, &at) in facts.iter().zip(&places).rev() {
        sentences.insert(at, (fact.clone(), true));
    }
    Some(lay(start, &sentences))
}

/// One chain of four assignments and one that leads astray.
pub(super) fn variables(kit: &Kit<'_>, length: usize, rng: &mut fastrand::Rng) -> Option<Sample> {
    const CHAIN: usize = 4;
    let mut letters: Vec<String> = (b'A'..=b'Z').map(|c| format!("{0}{0}{0}", c as char)).collect();
    rng.shuffle(&mut letters);
    let mut taken = Vec::new();
    let mut facts = Vec::new();
    let mut chain = |names: &[String], rng: &mut fastrand::Rng| {
        let value = kit.number(&mut taken, rng);
        let first = format!(" VAR {} = {value}.", names[0]);
        let rest = names.windows(2).map(|w| format!(" VAR {} = VAR {}.", w[1], w[0]));
        let lines: Vec<Vec<u32>> = std::iter::once(first)
            .chain(rest)
            .map(|l| kit.encode(&l))
            .collect();
        (value, lines)
    };
    let (value, lines) = chain(&letters[..CHAIN], rng);
    let (_, other) = chain(&letters[CHAIN..2 * CHAIN], rng);
    for (a, b) in lines.into_iter().zip(other) {
        facts.extend([a, b]);
    }
    let question = kit.encode(&format!(
        "\n\nQuestion: Which variables have the value {value}, directly or through other variables?\nAnswer: The variables with the value {value} are"
    ));
    let mut start = kit.start();
    start.extend(kit.encode("Variables are assigned in the following text. Follow the assignments."));
    let (context, places) = scatter(kit, start, &facts, length.checked_sub(question.len())?, rng)?;
    Some(Sample {
        context,
        question,
        answers: letters[..CHAIN].to_vec(),
        max_tokens: 32,
        facts: places.into_iter().step_by(2).collect(),
        parts: Vec::new(),
    })
}

/// Three words occur much more often than all others in a numbered list.
pub(super) fn common_words(kit: &Kit<'_>, length: usize, rng: &mut fastrand::Rng) -> Option<Sample> {
    const COMMON: usize = 3;
    let words = pick(WORDS, 40, rng);
    let question = kit.encode(&format!(
        "\n\nQuestion: Which {COMMON} words occur most often in the list?\nAnswer: The {COMMON} most common words are"
    ));
    let mut start = kit.start();
    start.extend(kit.encode("A list of words follows. Some of them occur more often than the others.\n"));
    // Of every ten entries six are common words, the others go round.
    let mut context = start;
    let room = length.checked_sub(question.len())?;
    let mut rare = words[COMMON..].iter().cycle();
    for i in 1.. {
        let word = if rng.usize(..10) < 6 {
            words[i % COMMON]
        } else {
            rare.next()?
        };
        let entry = kit.encode(&format!("\n{i}. {word}"));
        if context.len() + entry.len() > room {
            break;
        }
        context.extend(entry);
    }
    (context.len() > room / 2).then(|| Sample {
        context,
        question,
        answers: words[..COMMON].iter().map(|w| (*w).to_string()).collect(),
        max_tokens: 24,
        facts: Vec::new(),
        parts: Vec::new(),
    })
}

/// Made-up words whose frequencies fall like 1/rank; the three most frequent are asked for.
pub(super) fn frequent_words(kit: &Kit<'_>, length: usize, rng: &mut fastrand::Rng) -> Option<Sample> {
    const ASKED: usize = 3;
    let syllables = [
        "ba", "de", "fi", "go", "lu", "ma", "ne", "pi", "ro", "su", "ta", "ve",
    ];
    let mut coined: Vec<String> = Vec::new();
    while coined.len() < 24 {
        let word: String = (0..3).map(|_| syllables[rng.usize(..syllables.len())]).collect();
        if !coined.contains(&word) {
            coined.push(word);
        }
    }
    let question = kit.encode(&format!(
        "\n\nQuestion: Which {ASKED} coded words are the most frequent in the text?\nAnswer: The {ASKED} most frequent coded words are"
    ));
    let mut context = kit.start();
    context
        .extend(kit.encode("The following coded text has to be searched for its most frequent words.\n\n"));
    let room = length.checked_sub(question.len())?;
    let weights: Vec<f64> = (1..=coined.len()).map(|rank| 1.0 / rank as f64).collect();
    let total: f64 = weights.iter().sum();
    loop {
        let mut at = rng.f64() * total;
        let rank = weights.iter().position(|w| {
            at -= w;
            at < 0.0
        });
        let word = kit.encode(&format!(" {}", coined[rank.unwrap_or(0)]));
        if context.len() + word.len() > room {
            break;
        }
        context.extend(word);
    }
    (context.len() > room / 2).then(|| Sample {
        context,
        question,
        answers: coined[..ASKED].to_vec(),
        max_tokens: 32,
        facts: Vec::new(),
        parts: Vec::new(),
    })
}

/// A table of keys and numbers that fills the whole context.
pub(super) fn lookup(kit: &Kit<'_>, length: usize, depth: f64, rng: &mut fastrand::Rng) -> Option<Sample> {
    let (mut names, mut taken) = (Vec::new(), Vec::new());
    let mut entry = |rng: &mut fastrand::Rng| {
        let (name, number) = (name(&mut names, rng), kit.number(&mut taken, rng));
        let tokens = kit.encode(&format!("\n{name}: {number}"));
        (name, number, tokens)
    };
    let question = |name: &str| kit.encode(&format!("\n\nThe table again, one entry:\n{name}:"));
    let mut start = kit.start();
    start.extend(kit.encode("A table of names and numbers:\n"));
    // The longest question is as long as the names are.
    let reserve = question("crooked urchin").len() + 8;
    let room = length.checked_sub(start.len() + reserve)?;
    let (mut entries, mut used) = (Vec::new(), 0);
    while entries.len() < 512 {
        let e = entry(rng);
        if used + e.2.len() > room {
            break;
        }
        used += e.2.len();
        entries.push(e);
    }
    let at = ((entries.len().checked_sub(1)?) as f64 * depth).round() as usize;
    let (name, number) = (entries[at].0.clone(), entries[at].1.clone());
    let rows: Vec<(Vec<u32>, bool)> = entries
        .into_iter()
        .enumerate()
        .map(|(i, e)| (e.2, i == at))
        .collect();
    let (context, facts) = lay(start, &rows);
    Some(Sample {
        context,
        question: question(&name),
        answers: vec![number],
        max_tokens: kit.digits as usize + 4,
        facts,
        parts: Vec::new(),
    })
}

/// Who owns what stands in one document, where it is kept in another.
pub(super) fn two_hop(kit: &Kit<'_>, length: usize, rng: &mut fastrand::Rng) -> Option<Sample> {
    const PAIRS: usize = 3;
    let people = pick(
        &[
            "Agnes", "Bruno", "Celia", "Dmitri", "Esther", "Farid", "Greta", "Hugo", "Ines", "Jonas",
        ],
        PAIRS,
        rng,
    );
    let things = pick(
        &[
            "violin",
            "telescope",
            "compass",
            "typewriter",
            "globe",
            "microscope",
            "sextant",
            "harp",
        ],
        PAIRS,
        rng,
    );
    let rooms = pick(
        &[
            "cellar",
            "attic",
            "library",
            "stable",
            "greenhouse",
            "pantry",
            "tower",
            "workshop",
        ],
        PAIRS,
        rng,
    );
    let owns = (0..PAIRS).map(|i| format!(" {} is the owner of the {}.", people[i], things[i]));
    let kept = (0..PAIRS).map(|i| format!(" The {} is kept in the {}.", things[i], rooms[i]));
    let facts: Vec<Vec<u32>> = owns.chain(kept).map(|f| kit.encode(&f)).collect();
    let question = kit.encode(&format!(
        "\n\nQuestion: In which room is the thing kept that {} owns?\nAnswer: {} owns the",
        people[0], people[0]
    ));
    let (context, places) = scatter(kit, kit.start(), &facts, length.checked_sub(question.len())?, rng)?;
    Some(Sample {
        context,
        question,
        answers: vec![rooms[0].to_string()],
        max_tokens: 16,
        facts: vec![places[0].clone(), places[PAIRS].clone()],
        parts: Vec::new(),
    })
}

/// Lines labelled by a rule that only the examples show: which of six kinds of things the line names.
pub(super) fn many_shot(kit: &Kit<'_>, length: usize, rng: &mut fastrand::Rng) -> Option<Sample> {
    const KINDS: [(&str, [&str; 8]); 6] = [
        (
            "alpha",
            ["cat", "horse", "wolf", "rabbit", "tiger", "goat", "donkey", "fox"],
        ),
        (
            "beta",
            [
                "apple", "pear", "cherry", "grape", "plum", "lemon", "melon", "peach",
            ],
        ),
        (
            "gamma",
            [
                "hammer", "saw", "chisel", "wrench", "drill", "pliers", "shovel", "rake",
            ],
        ),
        (
            "delta",
            [
                "violin", "flute", "drum", "harp", "piano", "trumpet", "cello", "guitar",
            ],
        ),
        (
            "epsilon",
            [
                "rain", "snow", "hail", "wind", "fog", "frost", "storm", "sunshine",
            ],
        ),
        (
            "zeta",
            [
                "red", "blue", "green", "yellow", "purple", "orange", "brown", "pink",
            ],
        ),
    ];
    let line = |rng: &mut fastrand::Rng| {
        let (label, things) = &KINDS[rng.usize(..KINDS.len())];
        let thing = things[rng.usize(..things.len())];
        let text = match rng.usize(..4) {
            0 => format!("she spoke of the {thing}"),
            1 => format!("the book was about {thing}"),
            2 => format!("he dreamt of {thing} again"),
            _ => format!("they all asked for {thing}"),
        };
        (text, *label)
    };
    let (asked, label) = line(rng);
    let question = kit.encode(&format!("\nText: {asked}\nLabel:"));
    let room = length.checked_sub(question.len())?;
    let mut context = kit.start();
    context.extend(kit.encode("Texts and their labels."));
    let mut parts: Vec<Range<usize>> = Vec::new();
    loop {
        let (text, label) = line(rng);
        let shot = kit.encode(&format!("\nText: {text}\nLabel: {label}"));
        let from = context.len();
        if from + shot.len() > room {
            break;
        }
        context.extend(shot);
        match parts.last_mut() {
            Some(part) if context.len() - part.start <= kit.shots => part.end = context.len(),
            _ => parts.push(from..context.len()),
        }
    }
    (!parts.is_empty()).then(|| Sample {
        context,
        question,
        answers: vec![label.to_string()],
        max_tokens: 4,
        facts: Vec::new(),
        parts,
    })
}

/// Words, filler, a marker: the words again.
pub(super) fn copy(kit: &Kit<'_>, length: usize, rng: &mut fastrand::Rng) -> Option<Sample> {
    const COPIED: usize = 12;
    let words = pick(WORDS, COPIED, rng).join(" ");
    let question = kit.encode(&format!(
        "\n\nThe sentence to repeat, again: {}",
        words.split(' ').next()?
    ));
    let mut start = kit.start();
    start.extend(kit.encode("The sentence to repeat:"));
    let from = start.len();
    start.extend(kit.encode(&format!(" {words}")));
    let fact = from..start.len();
    start.extend(kit.encode("\n\n"));
    let room = length.checked_sub(question.len() + start.len())?;
    let filler = kit.prose.sentences(kit.tokenizer, room, rng);
    let (context, _) = lay(start, &filler.into_iter().map(|s| (s, false)).collect::<Vec<_>>());
    Some(Sample {
        context,
        question,
        answers: words.split(' ').skip(1).map(str::to_string).collect(),
        max_tokens: 3 * COPIED,
        facts: Vec::from([fact]),
        parts: Vec::new(),
    })
}
