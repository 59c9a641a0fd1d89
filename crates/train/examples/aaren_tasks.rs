//! Four kinds of task, Aaren beside a Transformer twin of the same size, some seeds each.
//!
//! `cargo run --release -p antefix-train --example aaren_tasks -- OUT [--data DIR] [--only NAME] [--seeds 3] [--fast]`
//!
//! `DIR` holds `JapaneseVowels_TRAIN.ts` and `JapaneseVowels_TEST.ts` (docs/aaren.md says where from); without it the task is left out.
//! Rows go to `OUT/aaren-tasks.jsonl`, trained models to `OUT/NAME-MIXER-SEED.safetensors`.
#![allow(clippy::print_stdout, reason = "that is what it is for")]

use std::io::Write;
use std::path::{Path, PathBuf};

use antefix_papers::aaren::{Config, Mixer, Norm};
use antefix_train::aaren::data::{Hawkes, Points, Quality, SinProcess, TsFile, multi_sine};
use antefix_train::aaren::tasks::{Classify, Control, Events, Forecast};
use antefix_train::aaren::{Plan, Problem, train};
use serde_json::json;

type Fallible<T> = Result<T, Box<dyn std::error::Error>>;

struct Arm {
    name: String,
    problem: Box<dyn Problem>,
    /// Width, heads, layers, feed-forward.
    size: [usize; 4],
    plan: Plan,
}

fn vowels(folder: &Path) -> Fallible<Classify> {
    let file = |part: &str| -> Fallible<TsFile> {
        let file = folder.join(format!("JapaneseVowels_{part}.ts"));
        let text = std::fs::read_to_string(&file).map_err(|e| format!("{}: {e}", file.display()))?;
        Ok(TsFile::parse(&text).map_err(|e| format!("{}, {e}", file.display()))?)
    };
    Ok(Classify::new(file("TRAIN")?, file("TEST")?)?)
}

fn sequences(
    n: [usize; 3],
    length: usize,
    seed: u64,
    mut one: impl FnMut(usize, &mut fastrand::Rng) -> Points,
) -> [Vec<Points>; 3] {
    let mut rng = fastrand::Rng::with_seed(seed);
    n.map(|n| (0..n).map(|_| one(length, &mut rng)).collect())
}

fn arms(data: Option<&Path>, fast: bool) -> Fallible<Vec<Arm>> {
    let pick = |fast_n: usize, full: usize| if fast { fast_n } else { full };
    let plan = |epochs: usize, batch: usize, lr: f64, decay: f64, patience: usize| Plan {
        epochs,
        batch,
        lr,
        decay,
        patience,
        seed: 0,
    };
    let mut arms = Vec::new();
    if let Some(data) = data {
        arms.push(Arm {
            name: "japanese_vowels".into(),
            problem: Box::new(vowels(data)?),
            size: [64, 8, 2, 128],
            plan: plan(pick(5, 60), 16, 1e-3, 1e-2, 15),
        });
    }
    let split = [pick(64, 512), pick(32, 128), pick(32, 256)];
    let sin = SinProcess {
        base: 1.0,
        swing: 0.9,
        period: 10.0,
    };
    let hawkes = Hawkes {
        base: 0.3,
        jump: 0.8,
        fade: 1.2,
    };
    for (name, [train, validation, test]) in [
        ("sin", sequences(split, 64, 11, |n, rng| sin.sample(n, rng))),
        ("hawkes", sequences(split, 64, 12, |n, rng| hawkes.sample(n, rng))),
    ] {
        arms.push(Arm {
            name: name.into(),
            problem: Box::new(Events::new(train, validation, test, 16)?),
            size: [64, 4, 2, 128],
            plan: plan(pick(3, 40), 32, 1e-3, 1e-2, 10),
        });
    }
    let series = multi_sine(4000, &[24.0, 37.0, 168.0], 0.3, &mut fastrand::Rng::with_seed(13));
    arms.push(Arm {
        name: "multi_sine".into(),
        problem: Box::new(Forecast::new(&series, 96, 24)?),
        size: [64, 8, 2, 128],
        plan: plan(pick(1, 8), 32, 1e-3, 1e-2, 4),
    });
    for quality in Quality::ALL {
        let mut rng = fastrand::Rng::with_seed(14);
        arms.push(Arm {
            name: format!("pendulum_{}", quality.name()),
            problem: Box::new(Control::new(quality, pick(40, 400), pick(10, 100), &mut rng)?),
            size: [64, 4, 2, 128],
            plan: plan(pick(2, 40), 32, 1e-3, 1e-2, 40),
        });
    }
    Ok(arms)
}

fn main() -> Fallible<()> {
    let (mut out, mut data, mut only, mut seeds, mut fast) = (None, None, None, 3u64, false);
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or(format!("`{word}` needs a value"));
        match word.as_str() {
            "--data" => data = Some(PathBuf::from(value()?)),
            "--only" => only = Some(value()?),
            "--seeds" => seeds = value()?.parse()?,
            "--fast" => fast = true,
            _ if out.is_none() && !word.starts_with("--") => out = Some(PathBuf::from(word)),
            _ => return Err(format!("`{word}` is not understood; see the head of this example").into()),
        }
    }
    let out = out.ok_or("a folder for the results is needed")?;
    std::fs::create_dir_all(&out)?;
    let mut rows = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(out.join("aaren-tasks.jsonl"))?;
    for arm in arms(data.as_deref(), fast)? {
        if only
            .as_ref()
            .is_some_and(|only| !arm.name.starts_with(only.as_str()))
        {
            continue;
        }
        let [width, heads, layers, ffn] = arm.size;
        for mixer in [Mixer::Aaren, Mixer::Attention] {
            let config = Config {
                mixer,
                width,
                heads,
                layers,
                ffn,
                norm: Norm::Pre,
                decay: 0.0,
                task: arm.problem.task(),
            };
            let name = match mixer {
                Mixer::Aaren => "aaren",
                Mixer::Attention => "transformer",
            };
            for seed in 1..=seeds {
                let report = train(&*arm.problem, &config, Plan { seed, ..arm.plan })?;
                let figures: serde_json::Map<_, _> = report
                    .figures
                    .iter()
                    .map(|(k, v)| (k.clone(), json!(v)))
                    .collect();
                let row = json!({
                    "task": arm.name, "mixer": name, "seed": seed, "figures": figures, "validation": report.best,
                    "parameters": config.parameters(), "width": width, "heads": heads, "layers": layers, "ffn": ffn,
                    "lr": arm.plan.lr, "decay": arm.plan.decay, "batch": arm.plan.batch, "epochs": report.epochs,
                    "steps": report.steps, "seconds": report.seconds, "fast": fast,
                });
                println!("{row}");
                writeln!(rows, "{row}")?;
                let file = out.join(format!("{}-{name}-{seed}.safetensors", arm.name));
                std::fs::write(file, report.net.export()?)?;
            }
        }
    }
    Ok(())
}
