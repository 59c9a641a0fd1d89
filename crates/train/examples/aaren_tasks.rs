//! Four kinds of task, Aaren beside a Transformer twin of the same size, some seeds each.
//!
//! `cargo run --release -p antefix-train --example aaren_tasks -- OUT [--data DIR] [--only NAME] [--seeds 3] [--fast]`
//!
//! `DIR` holds `JapaneseVowels_TRAIN.ts` and `JapaneseVowels_TEST.ts` (docs/aaren.md says where from); without it the task is left out.
//! Rows go to `OUT/aaren-tasks.jsonl`, trained models to `OUT/NAME-MIXER-SEED.safetensors`.
#![allow(clippy::print_stdout, reason = "that is what it is for")]

use std::io::Write;
use std::path::{Path, PathBuf};

use antefix_papers::aaren::Mixer;
use antefix_papers::repro::Scale;
use antefix_train::aaren::data::{Quality, TsFile};
use antefix_train::aaren::tasks::Classify;
use antefix_train::aaren::{Plan, train};
use antefix_train::repro::aaren::arms::{Arm, control, events, forecast};
use serde_json::json;

type Fallible<T> = Result<T, Box<dyn std::error::Error>>;

fn vowels(folder: &Path) -> Fallible<Classify> {
    let file = |part: &str| -> Fallible<TsFile> {
        let file = folder.join(format!("JapaneseVowels_{part}.ts"));
        let text = std::fs::read_to_string(&file).map_err(|e| format!("{}: {e}", file.display()))?;
        Ok(TsFile::parse(&text).map_err(|e| format!("{}, {e}", file.display()))?)
    };
    Ok(Classify::new(file("TRAIN")?, file("TEST")?)?)
}

fn arms(data: Option<&Path>, fast: bool) -> Fallible<Vec<Arm>> {
    let scale = if fast { Scale::Fast } else { Scale::Full };
    let mut arms = Vec::new();
    if let Some(data) = data {
        arms.push(Arm {
            name: "japanese_vowels".into(),
            problem: Box::new(vowels(data)?),
            size: [64, 8, 2, 128],
            plan: Plan {
                epochs: scale.pick(5, 60),
                batch: 16,
                lr: 1e-3,
                decay: 1e-2,
                patience: 15,
                seed: 0,
            },
            figure: ("accuracy", true),
        });
    }
    arms.extend(events(scale)?);
    arms.push(forecast(scale)?);
    for quality in Quality::ALL {
        arms.push(control(quality, scale)?);
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
            let config = arm.config(mixer);
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
