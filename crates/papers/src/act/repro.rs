//! Do calibrated heads help? Heads are chosen on labelled examples and tried on others, beside random heads and the reversed change; all
//! examples are others for each seed.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::repro::{
    Belief, Claim, HeadSearch, Judgement, Lab, LabError, Outcome, Passages, Quiz, Repro, SMOLLM2, Scale,
    Verdict, mean, mean_and_error,
};

/// The claim.
pub static REPRO: Repro = Repro {
    claim: Claim {
        slug: "act",
        says: "Handing weight of hidden sinks on to other keys, in heads chosen on labelled examples, raises accuracy (up to 7.30 % on average, \
                Llama-30B) without training.",
        source: "Yu et al., abstract.",
        rule: "On examples that did not choose the heads, those of all seeds together: the right label's log-probability gains more than twice its standard \
               error (else: not), more than with as many random heads, and the reversed change (sinks gain weight) does not gain. All: reproduced; without \
               one of the last two: partly.",
        model: SMOLLM2,
        fast_model: SMOLLM2,
    },
    run,
};

const ERRORS: f64 = 2.0;
/// Standard errors on each side of a mean within which it lies in 95 of 100 cases.
const CONFIDENCE: f64 = 1.96;
/// Share of all heads that is calibrated; 2 to 20 % in the official lists.
const SHARE: f64 = 0.05;
const LENGTH: usize = 128;

/// Differences of the right label's log-probability from the model as it is, one an example.
#[derive(Debug, Default)]
struct Gains {
    chosen: Vec<f64>,
    reversed: Vec<f64>,
    /// Mean over the draws.
    random: Vec<f64>,
}

/// What one seed brought.
struct Trial {
    heads: Vec<(usize, usize)>,
    gains: Gains,
    /// Mean log-probability of the right label: as the model is, and with the chosen heads.
    log_p: [f64; 2],
    /// Share of right answers, likewise.
    accuracy: [f64; 2],
    /// Time to the first token with the chosen heads, over that without.
    slower: f64,
    rows: Vec<Value>,
}

fn run(lab: &mut dyn Lab, scale: Scale) -> Result<Outcome, LabError> {
    let seeds = scale.pick(1, 3);
    let mut trials = Vec::new();
    for seed in 1..=seeds {
        trials.push(trial(lab, scale, seed)?);
    }
    let mut gains = Gains::default();
    for trial in &trials {
        gains.chosen.extend(&trial.gains.chosen);
        gains.reversed.extend(&trial.gains.reversed);
        gains.random.extend(&trial.gains.random);
    }
    let (as_it_is, with) = perplexity(lab, scale, &trials[0].heads)?;
    let over = |f: &dyn Fn(&Trial) -> f64| mean(trials.iter().map(f));
    let mut judgement = judge(
        mean_and_error(&gains.chosen),
        mean_and_error(&gains.reversed).0,
        mean_and_error(&gains.random).0,
    );
    judgement.why += &format!(
        "; right answers {:.3} without and {:.3} with; perplexity {as_it_is:.2} and {with:.2}; {:.2} times the time to the first token",
        over(&|t| t.accuracy[0]),
        over(&|t| t.accuracy[1]),
        over(&|t| t.slower)
    );
    let mut rows: Vec<Value> = trials.iter().flat_map(|t| t.rows.clone()).collect();
    for (which, gains) in [
        ("chosen", &gains.chosen),
        ("reversed", &gains.reversed),
        ("random", &gains.random),
    ] {
        rows.push(interval(json!({"which": which, "seeds": seeds}), gains));
    }
    rows.push(json!({"perplexity": as_it_is, "perplexity_with": with}));
    let facts = lab.facts();
    Ok(Outcome {
        unit: "log-probability of the right label, nats (baseline: the model as it is)",
        measured: over(&|t| t.log_p[1]),
        baseline: over(&|t| t.log_p[0]),
        scale: format!(
            "{seeds} seeds, each: {} of {} heads, chosen on {} examples of {LENGTH} tokens, tried on {}",
            trials[0].heads.len(),
            facts.layers.len() * facts.heads,
            examples(scale).0,
            examples(scale).1
        ),
        judgement,
        rows,
    })
}

/// Examples that choose the heads, and examples that try them.
fn examples(scale: Scale) -> (usize, usize) {
    scale.pick((2, 24), (6, 60))
}

fn trial(lab: &mut dyn Lab, scale: Scale, seed: u64) -> Result<Trial, LabError> {
    let (choosing, trying) = examples(scale);
    let test = lab.heads(&HeadSearch {
        kind: "act",
        runs: choosing,
        lengths: &[LENGTH],
        seed,
    })?;
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
    let mut ways = vec![calibrated(&best, ""), calibrated(&best, ",beta=1.6")];
    for draw in 0..scale.pick(2, 5) {
        ways.push(calibrated(&others(layers, heads, &best, (seed << 8) | draw), ""));
    }
    let mut chosen: Vec<&[String]> = vec![&[]];
    chosen.extend(ways.iter().map(std::slice::from_ref));
    let chosen: Vec<Vec<&str>> = chosen
        .iter()
        .map(|way| way.iter().map(String::as_str).collect())
        .collect();
    let chosen: Vec<&[&str]> = chosen.iter().map(Vec::as_slice).collect();
    let quiz = Quiz {
        task: "many-shot",
        length: LENGTH,
        depths: &[0.5],
        samples: trying,
        digits: 5,
        // Other examples than those that chose the heads.
        seed: 104_729 * seed,
        question_after_cut: false,
        reuse_prompts: false,
    };
    let found = lab.beliefs(&quiz, &chosen)?;
    let recall = lab.recall(&quiz, &chosen[..2])?;
    let log_p = |beliefs: &[Belief]| mean(beliefs.iter().map(|b| b.log_p));
    let gain = |with: &[Belief]| -> Vec<f64> {
        with.iter()
            .zip(&found[0])
            .map(|(a, b)| a.log_p - b.log_p)
            .collect()
    };
    let draws: Vec<Vec<f64>> = found[3..].iter().map(|b| gain(b)).collect();
    let names = json!({"seed": seed, "half_spearman": test.half_spearman, "heads": best});
    let mut rows = vec![names];
    for (beliefs, way) in found.iter().zip(&chosen) {
        let name = way.first().unwrap_or(&"dense");
        let names = json!({"seed": seed, "method": name, "log_p": log_p(beliefs)});
        rows.push(interval(names, &gain(beliefs)));
    }
    for (recall, which) in recall.iter().zip(["dense", "chosen"]) {
        rows.push(json!({
            "seed": seed, "which": which, "accuracy": recall.accuracy, "n": recall.n, "ttft_s": recall.ttft_s,
        }));
    }
    Ok(Trial {
        gains: Gains {
            chosen: gain(&found[1]),
            reversed: gain(&found[2]),
            random: (0..found[0].len())
                .map(|i| mean(draws.iter().map(|d| d[i])))
                .collect(),
        },
        log_p: [log_p(&found[0]), log_p(&found[1])],
        accuracy: [recall[0].accuracy, recall[1].accuracy],
        slower: recall[1].ttft_s / recall[0].ttft_s,
        heads: best,
        rows,
    })
}

/// The method with these heads by name; without any it changes nothing.
fn calibrated(heads: &[(usize, usize)], more: &str) -> String {
    let named: Vec<String> = heads.iter().map(|(l, h)| format!("{l}:{h}")).collect();
    match named.is_empty() {
        true => "act,top=0".into(),
        false => format!("act,mode=two_pass,heads={}{more}", named.join("+")),
    }
}

/// A row with the mean gain, its standard error and the interval in which it lies with 95 % confidence.
fn interval(mut names: Value, gains: &[f64]) -> Value {
    let (gain, error) = mean_and_error(gains);
    names["n"] = gains.len().into();
    names["gain"] = gain.into();
    names["error"] = error.into();
    names["interval"] = json!([gain - CONFIDENCE * error, gain + CONFIDENCE * error]);
    names
}

/// Perplexity of plain texts as the model is, and with `heads` calibrated by the rows before.
fn perplexity(lab: &mut dyn Lab, scale: Scale, heads: &[(usize, usize)]) -> Result<(f64, f64), LabError> {
    let length = scale.pick(256, 1024);
    let text = Passages {
        texts: scale.pick(1, 4),
        length,
        step: length,
        seed: 1,
    };
    let way = calibrated(heads, "");
    let found = lab.likelihood(&text, &[&[], &[&way]])?;
    let of = |way: usize| found[way].iter().map(|s| s.nll).sum::<f64>().exp();
    Ok((of(0), of(1)))
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
