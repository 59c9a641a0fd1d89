//! From coarse to fine over the dials of a method, by what a [`Bench`] tells of settings. Nothing here knows a model.

use std::collections::BTreeMap;

use antefix_attention::method::{Card, Dial, Knobs, Value};

/// What must hold of the settings that are looked for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Target {
    /// The least density at which plans keep at least this share of the weights of dense attention.
    Recall(f64),
    /// The least density at which predictions are no farther from those of dense attention, nats.
    Kl(f64),
    /// The largest recall at which no more than this share of the pairs is kept.
    Budget(f64),
}

impl Target {
    /// Whether figures meet it; a distance that was not measured meets nothing.
    pub fn met(self, figures: &Figures) -> bool {
        match self {
            Self::Recall(least) => figures.recall >= least,
            Self::Kl(most) => figures.kl.is_some_and(|kl| kl <= most),
            Self::Budget(most) => figures.density <= most,
        }
    }
}

/// What settings cost and keep.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Figures {
    /// Share of the weights of dense attention that plans keep.
    pub recall: f64,
    /// Kept pairs of query and key over all.
    pub density: f64,
    /// Distance of the predictions from those of dense attention, nats; if it was measured.
    pub kl: Option<f64>,
}

/// What settings are judged by.
pub trait Bench {
    /// Why it cannot.
    type Error;

    /// Recall and density of each of `settings`.
    ///
    /// # Errors
    /// When it cannot tell.
    fn look(&mut self, settings: &[Knobs]) -> Result<Vec<Figures>, Self::Error>;

    /// Distance of the predictions under `settings`, nats: dear.
    ///
    /// # Errors
    /// When it cannot tell.
    fn distance(&mut self, settings: &Knobs) -> Result<f64, Self::Error>;
}

/// Settings that were looked at.
#[derive(Debug, Clone, PartialEq)]
pub struct Point {
    /// The settings.
    pub knobs: Knobs,
    /// What they cost and keep.
    pub figures: Figures,
    /// Where its dials stand, 0 to 1 each.
    places: Vec<f64>,
}

/// Rounds behind the coarse one.
const ROUNDS: usize = 2;

/// Values of each dial in the coarse round.
const COARSE: [&[usize]; 2] = [&[7], &[5, 3]];

/// The settings that meet `target`, best first, or none; of `start`, with the values of `dials` (one or two) changed. `told` hears of every
/// setting with the name of the round, again when its distance is known. Same figures, same search.
///
/// # Errors
/// When the bench cannot tell.
///
/// # Panics
/// When there are no dials, or more than two.
pub fn search<B: Bench>(
    bench: &mut B,
    start: &Knobs,
    dials: &[Dial],
    target: Target,
    told: &mut dyn FnMut(&'static str, &Point),
) -> Result<Vec<Point>, B::Error> {
    let sizes = COARSE[dials.len() - 1];
    let mut points: Vec<Point> = Vec::new();
    let grid = |axis: usize| (0..sizes[axis]).map(move |i| i as f64 / (sizes[axis] - 1) as f64);
    let coarse: Vec<Vec<f64>> = match dials.len() {
        1 => grid(0).map(|a| vec![a]).collect(),
        _ => grid(0).flat_map(|a| grid(1).map(move |b| vec![a, b])).collect(),
    };
    let mut steps: Vec<f64> = sizes.iter().map(|&n| 1.0 / (n - 1) as f64).collect();
    let mut tries = coarse;
    for round in 0..=ROUNDS {
        let stage = if round == 0 { "coarse" } else { "fine" };
        let fresh = settings(start, dials, &tries, &points);
        let knobs: Vec<Knobs> = fresh.iter().map(|(knobs, _)| knobs.clone()).collect();
        let figures = match knobs.is_empty() {
            true => Vec::new(),
            false => bench.look(&knobs)?,
        };
        for ((knobs, places), figures) in fresh.into_iter().zip(figures) {
            let point = Point {
                knobs,
                figures,
                places,
            };
            told(stage, &point);
            points.push(point);
        }
        let ranked = ranked(bench, &mut points, target, told)?;
        let Some(&best) = ranked.order.first() else {
            break;
        };
        tries = around(&points[best].places, &steps);
        // One dial has its values between these two already.
        if let Some(other) = ranked.other.filter(|_| dials.len() > 1) {
            tries.extend(around(&points[other].places, &steps));
        }
        let parts = if dials.len() == 1 { 4.0 } else { 2.0 };
        steps.iter_mut().for_each(|step| *step /= parts);
    }
    let ranked = ranked(bench, &mut points, target, told)?;
    let met = ranked.order.into_iter().map(|i| points[i].clone());
    Ok(met.filter(|point| target.met(&point.figures)).collect())
}

/// The settings at `tries` that are none of `points`, and whose values the card allows.
fn settings(start: &Knobs, dials: &[Dial], tries: &[Vec<f64>], points: &[Point]) -> Vec<(Knobs, Vec<f64>)> {
    let card: &'static Card = start.card();
    let mut fresh: Vec<(Knobs, Vec<f64>)> = Vec::new();
    for places in tries {
        let mut values: BTreeMap<String, Value> = start
            .iter()
            .map(|(name, value)| (name.to_string(), value.clone()))
            .collect();
        for (dial, &place) in dials.iter().zip(places) {
            values.insert(dial.knob.to_string(), dial.value(card, place));
        }
        let Ok(knobs) = Knobs::new(card, &values) else {
            continue;
        };
        let known = points.iter().any(|p| p.knobs == knobs) || fresh.iter().any(|(k, _)| *k == knobs);
        if !known {
            fresh.push((knobs, places.clone()));
        }
    }
    fresh
}

/// Places beside `at`: in quarters of a step on both sides for one dial, in halves for two.
fn around(at: &[f64], steps: &[f64]) -> Vec<Vec<f64>> {
    let parts: &[f64] = match at.len() {
        1 => &[-0.75, -0.5, -0.25, 0.25, 0.5, 0.75],
        _ => &[-0.5, 0.0, 0.5],
    };
    let places = |i: usize| parts.iter().map(move |part| at[i] + part * steps[i]);
    let all: Vec<Vec<f64>> = match at.len() {
        1 => places(0).map(|a| vec![a]).collect(),
        _ => places(0)
            .flat_map(|a| places(1).map(move |b| vec![a, b]))
            .collect(),
    };
    let inside = |place: &f64| (0.0..=1.0).contains(place);
    all.into_iter()
        .filter(|places| places.iter().all(inside))
        .collect()
}

/// Of the points that no other beats in recall and density:
struct Ranked {
    /// Those that meet the target, best first; the nearest to it if none does.
    order: Vec<usize>,
    /// The nearest on the other side of the target.
    other: Option<usize>,
}

/// Ranks `points`; distances that are missing are measured.
fn ranked<B: Bench>(
    bench: &mut B,
    points: &mut [Point],
    target: Target,
    told: &mut dyn FnMut(&'static str, &Point),
) -> Result<Ranked, B::Error> {
    let front = front(points);
    let last = front.len().saturating_sub(1);
    // Of the front, those that meet the target are its end, under a budget its beginning.
    let first = match target {
        Target::Recall(_) => front.partition_point(|&i| !target.met(&points[i].figures)),
        Target::Budget(_) => {
            let within = front.partition_point(|&i| target.met(&points[i].figures));
            let order = front[..within.max(1).min(front.len())].iter().rev();
            return Ok(Ranked {
                order: order.copied().collect(),
                other: front.get(within).copied(),
            });
        }
        Target::Kl(_) => {
            // More recall, less distance: by halves.
            let (mut low, mut high) = (0, front.len());
            while low < high {
                let middle = usize::midpoint(low, high);
                let point = &mut points[front[middle]];
                if point.figures.kl.is_none() {
                    point.figures.kl = Some(bench.distance(&point.knobs)?);
                    told("distance", point);
                }
                match target.met(&point.figures) {
                    true => high = middle,
                    false => low = middle + 1,
                }
            }
            low
        }
    };
    Ok(Ranked {
        order: front[first.min(last)..].to_vec(),
        other: first.checked_sub(1).map(|before| front[before]),
    })
}

/// Indices of the points that no other beats, by ascending density and recall.
fn front(points: &[Point]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..points.len()).collect();
    let key = |i: usize| points[i].figures;
    order.sort_by(|&a, &b| {
        let (a, b) = (key(a), key(b));
        a.density
            .total_cmp(&b.density)
            .then(b.recall.total_cmp(&a.recall))
    });
    let mut best = f64::NEG_INFINITY;
    order.retain(|&i| {
        let better = key(i).recall > best;
        best = best.max(key(i).recall);
        better
    });
    order
}

#[cfg(test)]
mod tests {
    use antefix_attention::method::{Axis, Kind, Knob, Paper, Preset};

    use super::*;

    static CARD: Card = Card {
        name: "example",
        title: "Example",
        axis: Axis::Prefill,
        exact: false,
        summary: "Nothing but an example.",
        paper: Paper {
            title: "None",
            authors: "Nobody",
            year: 2026,
            reference: "none",
        },
        knobs: &[
            knob("share", Kind::above(0.0, 1.0), Preset::Float(0.5)),
            knob("least", Kind::int(1, 4096), Preset::Int(64)),
        ],
        query_dependent: false,
        needs: &[],
        neutral: None,
        source: file!(),
    };

    const fn knob(name: &'static str, kind: Kind, default: Preset) -> Knob {
        Knob {
            name,
            kind,
            default,
            unit: "",
            help: "For the test",
            source: "ours",
        }
    }

    const SHARE: Dial = Dial {
        knob: "share",
        from: 0.1,
        to: 0.7,
    };
    const LEAST: Dial = Dial {
        knob: "least",
        from: 16.0,
        to: 1024.0,
    };

    /// Density `share`, recall its square root, less below 64 keys at least; more of those cost a little and bring nothing. Distance: one less the root.
    #[derive(Default)]
    struct Made {
        looks: usize,
        settings: usize,
        distances: usize,
    }

    impl Bench for Made {
        type Error = std::convert::Infallible;

        fn look(&mut self, settings: &[Knobs]) -> Result<Vec<Figures>, Self::Error> {
            self.looks += 1;
            self.settings += settings.len();
            let one = |knobs: &Knobs| Figures {
                recall: knobs.float("share").sqrt() - 0.2 * f64::from(u8::from(knobs.size("least") < 64)),
                density: knobs.float("share") + knobs.size("least") as f64 * 1e-4,
                kl: None,
            };
            Ok(settings.iter().map(one).collect())
        }

        fn distance(&mut self, settings: &Knobs) -> Result<f64, Self::Error> {
            self.distances += 1;
            Ok(1.0 - settings.float("share").sqrt())
        }
    }

    fn found(dials: &[Dial], target: Target) -> (Made, Vec<Point>, usize) {
        let (mut made, mut heard) = (Made::default(), 0);
        let start = Knobs::defaults(&CARD);
        let points = search(&mut made, &start, dials, target, &mut |_, _| heard += 1);
        let Ok(points) = points;
        (made, points, heard)
    }

    #[test]
    fn one_dial_ends_near_the_cheapest_setting_that_meets_the_target() {
        let (made, points, heard) = found(&[SHARE], Target::Recall(0.64));
        // The square root of 0.4096.
        let best = points[0].knobs.float("share");
        assert!((0.4096..0.43).contains(&best), "{best}");
        assert_eq!((made.looks, made.distances, heard), (3, 0, made.settings));
        assert!(made.settings <= 7 + 6 + 6);
        // What follows is dearer and keeps more.
        assert!(points.windows(2).all(
            |p| p[0].figures.density < p[1].figures.density && p[0].figures.recall < p[1].figures.recall
        ));

        let (_, points, _) = found(&[SHARE], Target::Budget(0.3));
        let best = points[0].figures.density;
        assert!((0.28..=0.3).contains(&best), "{best}");
        assert!(points.iter().all(|p| p.figures.density <= 0.3));

        let (made, points, _) = found(&[SHARE], Target::Kl(0.4));
        let best = points[0].knobs.float("share");
        assert!(
            (0.36..0.38).contains(&best) && points[0].figures.kl.is_some(),
            "{best}"
        );
        assert!(made.distances <= 12, "{}", made.distances);
    }

    #[test]
    fn two_dials_find_the_one_that_costs_nothing() {
        let (made, points, _) = found(&[SHARE, LEAST], Target::Recall(0.64));
        let knobs = &points[0].knobs;
        assert!((0.4096..0.45).contains(&knobs.float("share")), "{knobs}");
        assert!((64..128).contains(&knobs.size("least")), "{knobs}");
        assert!(made.settings <= 15 + 17 + 17);
    }

    #[test]
    fn a_target_that_nothing_meets_finds_nothing() {
        for target in [Target::Recall(0.9), Target::Budget(0.05), Target::Kl(0.01)] {
            let (_, points, heard) = found(&[SHARE], target);
            assert!(points.is_empty() && heard > 7, "{target:?}");
        }
    }

    #[test]
    fn the_same_figures_make_the_same_search() {
        let all = || {
            let mut heard = Vec::new();
            let start = Knobs::defaults(&CARD);
            let mut told = |stage: &'static str, point: &Point| heard.push((stage, point.clone()));
            let done = search(
                &mut Made::default(),
                &start,
                &[SHARE, LEAST],
                Target::Kl(0.4),
                &mut told,
            );
            let Ok(done) = done;
            (heard, done)
        };
        assert_eq!(all(), all());
    }
}
