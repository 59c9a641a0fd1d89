//! Facts hidden in filler text.

use super::{Kit, Sample, lay};

/// A sentence to hide, the question it answers and the part of it that is the answer.
///
/// Long answers of tokens that are rare in the filler: copying one takes many steps, which is what head detection counts
/// (paper `retrieval_heads`, section 2.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Needle {
    /// What is asked.
    pub question: &'static str,
    /// The sentence that is hidden.
    pub needle: &'static str,
    /// The clause of it that answers the question.
    pub answer: &'static str,
}

/// Needles for head detection.
pub const NEEDLES: [Needle; 6] = [
    Needle {
        question: "What did Ilse plant behind the customs house in Rotterdam?",
        needle: "Behind the customs house in Rotterdam Ilse planted eleven dwarf quince trees and a hedge of purple barberry.",
        answer: "eleven dwarf quince trees and a hedge of purple barberry",
    },
    Needle {
        question: "What must be stirred into the walnut dough at the very end?",
        needle: "At the very end the walnut dough is stirred with two spoons of buckwheat syrup, grated nutmeg and a pinch of smoked salt.",
        answer: "two spoons of buckwheat syrup, grated nutmeg and a pinch of smoked salt",
    },
    Needle {
        question: "Why did Professor Okafor refuse to enter the elevator?",
        needle: "Professor Okafor refused to enter the elevator because its humming reminded him of a swarm of hornets in Enugu.",
        answer: "its humming reminded him of a swarm of hornets in Enugu",
    },
    Needle {
        question: "Which label is glued on the freezer of the polymer laboratory?",
        needle: "The label glued on the freezer of the polymer laboratory reads quartz violet nineteen under the second magnet.",
        answer: "quartz violet nineteen under the second magnet",
    },
    Needle {
        question: "When does the night train from Tromso to Vilnius leave?",
        needle: "The night train from Tromso to Vilnius leaves seven minutes past four from the platform with the green clock.",
        answer: "seven minutes past four from the platform with the green clock",
    },
    Needle {
        question: "What is the best thing to do on a rainy Sunday in Valparaiso?",
        needle: "The best thing to do on a rainy Sunday in Valparaiso is to ride the yellow funicular and eat fried squid by the window.",
        answer: "ride the yellow funicular and eat fried squid by the window",
    },
];

const ADJECTIVES: &[&str] = &[
    "amber", "brisk", "crooked", "dusty", "eager", "frosty", "gentle", "hollow", "ivory", "jolly", "keen",
    "lunar", "mellow", "nimble", "oaken", "plain", "quiet", "rustic", "silent", "tender", "upper", "velvet",
    "woolen", "zesty",
];
const NOUNS: &[&str] = &[
    "anchor", "badger", "candle", "dolphin", "ember", "falcon", "garnet", "hammer", "island", "jasmine",
    "kettle", "lantern", "marble", "nutmeg", "otter", "pepper", "quarry", "ribbon", "saddle", "turnip",
    "urchin", "violin", "walnut", "yarrow",
];

/// A name that is not in `taken`.
pub(super) fn name(taken: &mut Vec<String>, rng: &mut fastrand::Rng) -> String {
    loop {
        let adjective = ADJECTIVES[rng.usize(..ADJECTIVES.len())];
        let noun = NOUNS[rng.usize(..NOUNS.len())];
        let name = format!("{adjective} {noun}");
        if !taken.contains(&name) || taken.len() >= ADJECTIVES.len() * NOUNS.len() {
            taken.push(name.clone());
            return name;
        }
    }
}

/// Places among `n` sentences: the first at `depth`, the others anywhere.
fn places(n: usize, depth: f64, count: usize, rng: &mut fastrand::Rng) -> Vec<usize> {
    let mut places = vec![(n as f64 * depth).round() as usize];
    places.extend((1..count).map(|_| rng.usize(..=n)));
    places
}

/// `keys` names with `values` numbers each; the first name is asked for. The first fact stands at `depth`.
pub(super) fn numbers(
    kit: &Kit<'_>,
    length: usize,
    depth: f64,
    (keys, values): (usize, usize),
    rng: &mut fastrand::Rng,
) -> Option<Sample> {
    let (mut names, mut taken) = (Vec::new(), Vec::new());
    let mut facts = Vec::new();
    for _ in 0..keys {
        let name = name(&mut names, rng);
        for _ in 0..values {
            let number = kit.number(&mut taken, rng);
            facts.push(kit.encode(&format!(" The special number of the {name} is {number}.")));
        }
    }
    let asked = &names[0];
    let ask = if values == 1 {
        format!(
            "\n\nQuestion: What is the special number of the {asked}?\nAnswer: The special number of the {asked} is"
        )
    } else {
        format!(
            "\n\nQuestion: What are all the special numbers of the {asked}?\nAnswer: The special numbers of the {asked} are"
        )
    };
    let question = kit.encode(&ask);
    let mut start = kit.start();
    start.extend(kit.encode("Somewhere in the following text special numbers are hidden. Remember them."));
    let used = start.len() + question.len() + facts.iter().map(Vec::len).sum::<usize>();
    let filler = kit.prose.sentences(kit.tokenizer, length.checked_sub(used)?, rng);
    let places = places(filler.len(), depth, facts.len(), rng);
    let mut sentences = Vec::with_capacity(filler.len() + facts.len());
    let mut filler = filler.into_iter();
    for at in 0..=filler.len() {
        let here = (0..facts.len()).filter(|&i| places[i] == at);
        sentences.extend(here.map(|i| (facts[i].clone(), i < values)));
        sentences.extend(filler.next().map(|sentence| (sentence, false)));
    }
    let (context, facts) = lay(start, &sentences);
    Some(Sample {
        context,
        question,
        answers: taken[..values].to_vec(),
        max_tokens: values * (kit.digits as usize + 4) + 4,
        facts,
        parts: Vec::new(),
    })
}

/// A run of head detection: `needle` at `depth` of filler, asked for as in paper `retrieval_heads`, section 2.1.
///
/// [`Sample::facts`] holds one range: the answer clause inside the needle, without what stands before it.
pub fn needle_run(kit: &Kit<'_>, needle: &Needle, length: usize, depth: f64, seed: u64) -> Option<Sample> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let question = kit.encode(&format!(
        "\n\nBased on the text above, answer the question with words of the text.\nQuestion: {}\nAnswer:",
        needle.question
    ));
    let (before, after) = needle.needle.split_once(needle.answer)?;
    // Encoded piece by piece, so that the answer's tokens have borders of their own.
    let before = kit.encode(&format!(" {}", before.trim_end()));
    let answer = kit.encode(&format!(" {}", needle.answer));
    let after = kit.encode(after);
    let start = kit.start();
    let used = start.len() + question.len() + before.len() + answer.len() + after.len();
    let filler = kit
        .prose
        .sentences(kit.tokenizer, length.checked_sub(used)?, &mut rng);
    let at = (filler.len() as f64 * depth.clamp(0.0, 1.0)).round() as usize;
    let mut sentences: Vec<(Vec<u32>, bool)> = filler.into_iter().map(|s| (s, false)).collect();
    sentences.splice(at..at, [(before, false), (answer, true), (after, false)]);
    let (context, facts) = lay(start, &sentences);
    Some(Sample {
        context,
        question,
        answers: vec![needle.answer.to_string()],
        max_tokens: 50,
        facts,
        parts: Vec::new(),
    })
}
