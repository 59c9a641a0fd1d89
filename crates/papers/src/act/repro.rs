//! Do calibrated heads help? Heads are chosen on labelled examples and tried on others, beside random heads and the reversed change.

use std::collections::BTreeSet;

use serde_json::json;

use crate::repro::{
    Belief, HeadSearch, Judgement, Lab, LabError, Outcome, PROFILE, Quiz, Repro, SMOLLM2, Scale, Verdict,
    mean,
};

/// The claim.
pub static REPRO: Repro = Repro {
    slug: "act",
    claim: "Handing weight of hidden sinks on to other keys, in heads chosen on labelled examples, raises accuracy (up to 7.30 % on average, \
            Llama-30B) without training.",
    source: "Yu et al., abstract.",
    rule: "On examples that did not choose the heads: the right label's log-probability gains more than twice its standard error (else: not), more than with \
           as many random heads, and the reversed change (sinks gain weight) does not gain. All: reproduced; without one of the last two: partly.",
    model: SMOLLM2,
    run,
};

const ERRORS: f64 = 2.0;
/// Share of all heads that is calibrated; 2 to 20 % in the official lists.
const SHARE: f64 = 0.05;

fn run(lab: &mut dyn Lab, scale: Scale) -> Result<Outcome, LabError> {
    let search = HeadSearch {
        kind: "act",
        runs: scale.pick(4, 24),
        lengths: scale.pick(&[128], &[192]),
        seed: 1,
    };
    let test = lab.heads(&search)?;
    let facts = lab.facts();
    let (layers, heads) = (facts.layers.len(), facts.heads);
    let top = ((layers * heads) as f64 * SHARE).round().max(1.0) as usize;
    let best: Vec<(usize, usize)> = test
        .ranking()
        .iter()
        .filter(|r| r.score > 0.0)
        .take(top)
        .map(|r| (r.layer, r.head))
        .collect();
    if best.is_empty() {
        return Err(LabError::Model("no head gains when it is calibrated".into()));
    }
    let act = format!("act,mode=two_pass,top={top},profile={PROFILE}");
    let reversed = format!("{act},beta=1.6");
    let draws = scale.pick(2, 5);
    let mut ways = vec![act, reversed];
    for draw in 0..draws {
        let others = others(layers, heads, &best, draw);
        let named: Vec<String> = others.iter().map(|(l, h)| format!("{l}:{h}")).collect();
        ways.push(match named.is_empty() {
            true => "act,top=0".into(),
            false => format!("act,mode=two_pass,heads={}", named.join("+")),
        });
    }
    let mut chosen: Vec<Vec<&str>> = vec![Vec::new()];
    chosen.extend(ways.iter().map(|w| vec![w.as_str()]));
    let chosen: Vec<&[&str]> = chosen.iter().map(Vec::as_slice).collect();
    let quiz = Quiz {
        task: "many-shot",
        length: search.lengths[0],
        depths: &[0.5],
        samples: scale.pick(24, 200),
        digits: 5,
        // Other examples than those that chose the heads.
        seed: 104_729,
        question_after_cut: false,
    };
    let found = lab.beliefs(&quiz, &chosen)?;
    let log_p = |beliefs: &[Belief]| mean(beliefs.iter().map(|b| b.log_p));
    let mut rows = vec![json!({"half_spearman": test.half_spearman, "heads": best})];
    rows.extend(found.iter().zip(&chosen).map(|(beliefs, way)| {
        json!({"method": way.first().unwrap_or(&"dense"), "n": beliefs.len(), "log_p": log_p(beliefs)})
    }));
    let gains: Vec<(f64, f64)> = found[1..].iter().map(|b| gain(b, &found[0])).collect();
    let random = mean(gains[2..].iter().map(|g| g.0));
    Ok(Outcome {
        unit: "log-probability of the right label, nats (baseline: the model as it is)",
        measured: log_p(&found[1]),
        baseline: log_p(&found[0]),
        scale: format!(
            "{} of {} heads, chosen on {} examples of {} tokens, tried on {}",
            best.len(),
            layers * heads,
            search.runs,
            search.lengths[0],
            quiz.samples
        ),
        judgement: judge(gains[0], gains[1].0, random),
        rows,
    })
}

/// As many heads as `best` that are not in it, of the layers that may be calibrated: all but the first two and the last.
fn others(layers: usize, heads: usize, best: &[(usize, usize)], draw: u64) -> Vec<(usize, usize)> {
    let mut rng = fastrand::Rng::with_seed(draw + 1);
    let taken: BTreeSet<_> = best.iter().collect();
    let mut all: Vec<(usize, usize)> = (2..layers.saturating_sub(1))
        .flat_map(|l| (0..heads).map(move |h| (l, h)))
        .filter(|head| !taken.contains(head))
        .collect();
    rng.shuffle(&mut all);
    all.truncate(best.len());
    all
}

/// Mean gain of the log-probability over pairs of examples, and its standard error.
fn gain(with: &[Belief], without: &[Belief]) -> (f64, f64) {
    let pairs: Vec<f64> = with.iter().zip(without).map(|(a, b)| a.log_p - b.log_p).collect();
    let middle = mean(pairs.iter().copied());
    let variance = pairs.iter().map(|x| (x - middle).powi(2)).sum::<f64>() / (pairs.len().max(2) - 1) as f64;
    (middle, (variance / pairs.len().max(1) as f64).sqrt())
}

/// Gains: of the chosen heads with their standard error, of the reversed change, of random heads.
fn judge((gain, error): (f64, f64), reversed: f64, random: f64) -> Judgement {
    let verdict = match [gain > ERRORS * error, gain > random, reversed <= 0.0] {
        [true, true, true] => Verdict::Reproduced,
        [true, true, _] | [true, _, true] => Verdict::Partly,
        _ => Verdict::Not,
    };
    Judgement {
        verdict,
        why: format!(
            "log-probability of the right label {gain:+.4} ± {error:.4} with the chosen heads, {random:+.4} with random ones, {reversed:+.4} reversed"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gain_counts_beyond_its_error_and_against_both_controls() {
        let verdict = |gain, reversed, random| judge((gain, 0.1), reversed, random).verdict;
        assert_eq!(verdict(0.21, 0.0, 0.2), Verdict::Reproduced);
        assert_eq!(verdict(0.2, 0.0, 0.1), Verdict::Not);
        assert_eq!(verdict(0.21, 0.01, 0.2), Verdict::Partly);
        assert_eq!(verdict(0.21, 0.0, 0.21), Verdict::Partly);
        assert_eq!(verdict(0.21, 0.01, 0.21), Verdict::Not);
    }

    #[test]
    fn random_heads_are_other_heads_of_the_inner_layers() {
        let best = [(2, 0), (3, 1)];
        let found = others(6, 4, &best, 0);
        assert_eq!(found.len(), 2);
        assert!(found.iter().all(|h| !best.contains(h) && (2..5).contains(&h.0)));
        assert_eq!(found, others(6, 4, &best, 0));
        assert!(others(3, 4, &best, 0).is_empty());
    }
}
