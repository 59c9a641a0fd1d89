//! Harvests, splices and attribution on small models that run.

use std::path::PathBuf;
use std::sync::Arc;

use antefix_attention::hooks::{HookPlan, HookSpec, Observer, Sources, Values};
use antefix_attention::method::HookMaker;
use antefix_conformance::tiny;
use antefix_engine::Session;
use antefix_kernels::cpu::Cpu;
use antefix_kernels::dense::Threads;
use antefix_models::decoder::Model;
use antefix_models::spec::Arch;
use antefix_models::tokenizer::Tokenizer;
use antefix_papers::attention_sae::live::{Change, Edit, Live, Maker, Rows as Which, Wish};
use antefix_papers::attention_sae::loaded::Loaded;
use antefix_papers::attention_sae::{Origin, Sae, Stored, made_up};
use serde_json::json;

use super::baselines::Pca;
use super::features::{Fired, add_logits, add_sources, attribute_text, direct_logits};
use super::splice::{Replace, measure, recovered};
use crate::harvest::{Batches, HarvestError, Limits, Rows, Texts, harvest};

fn texts(folder: &std::path::Path) -> Vec<PathBuf> {
    let text = |n: usize, seed: usize| -> String {
        (0..n)
            .map(|i| char::from(b'a' + ((i * i + seed * i) % 23) as u8))
            .collect()
    };
    std::fs::create_dir_all(folder.join("b")).unwrap();
    std::fs::write(folder.join("b/one.txt"), text(900, 3)).unwrap();
    std::fs::write(folder.join("a.txt"), text(2000, 5)).unwrap();
    std::fs::write(folder.join("c.bin"), [0xff, 0xfe, 0x00]).unwrap();
    std::fs::write(folder.join("d.txt"), [0xff, 0xfe, 0x00]).unwrap();
    vec![folder.to_owned()]
}

fn model() -> (Arc<Model>, Arc<Tokenizer>) {
    tiny(Arch::Llama, Cpu::best(), 2)
}

fn dictionary(model: &Model) -> Sae {
    Stored::from_bytes(&made_up(&model.facts())).unwrap().sae
}

const CONTEXT: usize = 16;

/// Texts that end within the rows that are left out, and limits below one row, are errors: an empty harvest is none.
#[test]
fn a_harvest_of_nothing_is_refused() {
    let (model, tokenizer) = model();
    let at = tempfile::tempdir().unwrap();
    let paths = texts(&at.path().join("texts"));
    for (skip, tokens, what) in [(1_000_000, 1000, "left out"), (0, 1, "limits")] {
        let error = harvest(
            (&model, &tokenizer, "tiny"),
            Texts::new(&paths, &["txt".into()], CONTEXT, 1).unwrap(),
            (&[0], skip, 4),
            &at.path().join("out"),
            &Limits {
                tokens,
                bytes: 1 << 30,
            },
            |_| (),
        )
        .err()
        .unwrap()
        .to_string();
        assert!(error.contains(what), "{error}");
    }
}

#[test]
fn a_harvest_goes_on_where_it_was_left_and_its_batches_hold_every_row_once() {
    let (model, tokenizer) = model();
    let at = tempfile::tempdir().unwrap();
    let paths = texts(&at.path().join("texts"));
    let read = || Texts::new(&paths, &["txt".into()], CONTEXT, 1).unwrap();
    assert_eq!(read().files().len(), 3, "what has another ending is not read");
    let run = |folder: &str, layers: &[usize], tokens: usize, bytes: u64| {
        let limits = Limits { tokens, bytes };
        harvest(
            (&model, &tokenizer, "tiny"),
            read(),
            (layers, 2, 4),
            &at.path().join(folder),
            &limits,
            |_| (),
        )
    };
    let whole = run("whole", &[0, 1], 20 * CONTEXT, 1 << 30).unwrap();
    assert_eq!((whole.tokens, whole.done), (20 * CONTEXT, false));
    // Limits by tokens and by bytes, then the rest.
    run("parts", &[1, 0], 8 * CONTEXT, 1 << 30).unwrap();
    let row = whole.bytes / 20;
    assert_eq!(
        run("parts", &[0, 1], 20 * CONTEXT, row * 13).unwrap().tokens,
        13 * CONTEXT
    );
    let folder = |name: &str| at.path().join(name);
    for layer in [0, 1] {
        let (a, b) = (
            Rows::open(&folder("whole"), layer).unwrap(),
            Rows::open(&folder("parts"), layer).unwrap(),
        );
        for shard in 0..3 {
            assert!(a.bits(shard).unwrap() == b.bits(shard).unwrap());
            assert!(a.token_ids(shard).unwrap() == b.token_ids(shard).unwrap());
        }
    }
    // One layer alone has the same rows; the first token is the begin token.
    run("alone", &[1], 8 * CONTEXT, 1 << 30).unwrap();
    let (both, alone) = (
        Rows::open(&folder("whole"), 1).unwrap(),
        Rows::open(&folder("alone"), 1).unwrap(),
    );
    assert!(both.bits(1).unwrap() == alone.bits(1).unwrap());
    assert!(
        both.token_ids(0)
            .unwrap()
            .iter()
            .step_by(CONTEXT)
            .all(|t| *t == 1)
    );
    // They are what a whole pass has there, although the harvest leaves later layers out.
    let spec = json!({"captures": [{"at": {"site": "attn.hook_z", "layers": [0]}, "dtype": "bf16"}]});
    let spec: HookSpec = serde_json::from_value(spec).unwrap();
    let plan = HookPlan::compile(&spec, model.hook_shape(), &Sources::default()).unwrap();
    run("first", &[0], CONTEXT, 1 << 30).unwrap();
    let first = Rows::open(&folder("first"), 0).unwrap();
    let mut session = Session::new(Arc::clone(&model), CONTEXT, CONTEXT);
    let observer = Arc::new(Observer::new(Arc::new(plan), CONTEXT, 1 << 20));
    session.observe(Some(Arc::clone(&observer)));
    session
        .feed(&first.token_ids(0).unwrap(), CONTEXT, &mut Vec::new())
        .unwrap();
    let Values::Bf16(whole_pass) = &observer.take()[0].values else {
        panic!("bf16 was asked for")
    };
    assert!(*whole_pass == first.bits(0).unwrap());
    // Other settings in the same folder, and layers that are not there, are refused.
    assert!(matches!(
        run("alone", &[0], 9 * CONTEXT, 1 << 30),
        Err(HarvestError::Other { .. })
    ));
    assert!(matches!(
        run("none", &[99], CONTEXT, 1),
        Err(HarvestError::Layer { layer: 99, .. })
    ));
    assert!(matches!(
        Rows::open(&folder("alone"), 0),
        Err(HarvestError::Layer { layer: 0, .. })
    ));
    // The texts end.
    assert!(run("end", &[0], usize::MAX, 1 << 30).unwrap().done);

    let width = both.about().width;
    let key = |row: &[f32]| row.iter().map(|x| x.to_bits()).collect::<Vec<u32>>();
    let mut want: Vec<Vec<u32>> = (0..both.shards())
        .flat_map(|s| both.rows(s).unwrap().chunks(width).map(key).collect::<Vec<_>>())
        .collect();
    want.sort();
    for pool in [1, 1 << 30] {
        let make = || Batches::new(both.clone(), 24, pool, 9).unwrap();
        let (mut batches, mut seen, mut firsts) = (make(), Vec::new(), Vec::new());
        while seen.len() < 2 * want.len() {
            let batch = batches.next_batch().unwrap();
            seen.extend(batch.chunks(width).map(key));
            firsts.push(batch);
        }
        for epoch in seen.chunks(want.len()) {
            let mut epoch = epoch.to_vec();
            epoch.sort();
            assert!(epoch == want, "every row once an epoch");
        }
        assert!(seen[..want.len()] != seen[want.len()..], "another order");
        for n in [0, 1, 5, firsts.len() - 1] {
            let mut again = make();
            again.seek(n as u64).unwrap();
            assert!(again.next_batch().unwrap() == firsts[n], "batch {n}");
        }
    }
}

/// Section 6 (1): a dictionary that looks, and edits that change nothing, leave every logit as it is.
#[test]
fn looking_and_edits_that_change_nothing_leave_the_logits() {
    let (model, _) = model();
    let tokens: Vec<u32> = (0..60).map(|i| (i * 7 + 3) % 250).collect();
    let logits = |wish: Option<Wish>| {
        let mut session = Session::new(Arc::clone(&model), 64, 64);
        if let Some(wish) = wish {
            let plan =
                HookPlan::compile(&HookSpec::default(), model.hook_shape(), &Sources::default()).unwrap();
            let stored = Stored::new(dictionary(&model), Origin::default());
            let loaded = Loaded::new(stored).unwrap();
            let maker = Maker(Arc::new(Live::new(Arc::new(loaded), wish, 1).unwrap()));
            session.observe(Some(Arc::new(
                Observer::new(Arc::new(plan), 60, 0).with(maker.make(60)),
            )));
        }
        let mut out = Vec::new();
        session.feed(&tokens, 60, &mut out).unwrap();
        out
    };
    let wish = |changes: &[Change]| Wish {
        layer: 1,
        read: Which::All,
        top: 8,
        edits: changes
            .iter()
            .enumerate()
            .map(|(j, c)| Edit {
                feature: j as u32,
                change: *c,
            })
            .collect(),
        edit_rows: Which::All,
    };
    let plain = logits(None);
    let same = |a: &[f32]| a.iter().zip(&plain).all(|(a, b)| a.to_bits() == b.to_bits());
    assert!(same(&logits(Some(wish(&[])))));
    assert!(same(&logits(Some(wish(&[Change::Scale(1.0); 24])))));
    assert!(!same(&logits(Some(wish(&[Change::Set(3.0)])))));
}

#[test]
fn all_components_recover_everything_and_zeros_nothing() {
    let (model, _) = model();
    let rows: Vec<Vec<u32>> = (0..3)
        .map(|r| (0..20).map(|i| (i * 11 + r * 5 + 1) % 250).collect())
        .collect();
    let facts = model.facts();
    let d = facts.heads * facts.dim;
    let random: Vec<f32> = (0..4 * d * d)
        .map(|i| ((i * 7919 % 1000) as f32 - 500.0) / 300.0)
        .collect();
    let one = |with: &Replace| measure(&model, &rows, 1, with, |_| ()).unwrap();
    let (clean, zero) = (one(&Replace::Nothing), one(&Replace::Zero));
    assert_eq!(clean.tokens, 57);
    let full = one(&Replace::Pca(Arc::new(Pca::fit(&random, d, d))));
    assert!(
        (full.ce - clean.ce).abs() < 1e-3 && full.explained > 0.999,
        "{full:?} {clean:?}"
    );
    let none = one(&Replace::Sae(Arc::new(dictionary(&model))));
    assert!(none.ce.is_finite() && none.l0 > 0.0);
    assert!((recovered(full.ce, zero.ce, clean.ce) - 1.0).abs() < 0.2);
    assert_eq!(recovered(zero.ce, zero.ce, clean.ce), 0.0);
    assert_ne!(zero.ce, zero.ce_without_bos);
}

#[test]
fn cards_have_the_values_of_the_dictionary_and_sums_of_attribution_are_exact() {
    let (model, tokenizer) = model();
    let at = tempfile::tempdir().unwrap();
    let paths = texts(&at.path().join("texts"));
    let limits = Limits {
        tokens: 30 * CONTEXT,
        bytes: 1 << 30,
    };
    let texts = Texts::new(&paths, &["txt".into()], CONTEXT, 1).unwrap();
    let folder = at.path().join("z");
    harvest(
        (&model, &tokenizer, "tiny"),
        texts,
        (&[1], 0, 8),
        &folder,
        &limits,
        |_| (),
    )
    .unwrap();
    let rows = Rows::open(&folder, 1).unwrap();
    let sae = dictionary(&model);
    let fired = Fired::new(&sae, &rows, 20 * CONTEXT + 3).unwrap();
    assert_eq!(fired.tokens.len(), 20 * CONTEXT);
    let z: Vec<f32> = (0..3)
        .flat_map(|s| rows.rows(s).unwrap())
        .take(20 * CONTEXT * sae.d_in())
        .collect();
    let codes = sae.encode(&z, Threads::One);
    let (bins, never) = fired.densities();
    assert!((bins.iter().sum::<f64>() + never - 1.0).abs() < 1e-9);
    let heads = model.facts().heads;
    let mut cards: Vec<_> = (0..sae.features())
        .map(|j| fired.card(&sae, j, heads, &tokenizer))
        .collect();
    for card in &cards {
        let values: Vec<f32> = (0..codes.rows())
            .filter_map(|r| {
                let (ids, values) = codes.row(r);
                ids.iter()
                    .position(|id| *id as usize == card.feature)
                    .map(|i| values[i])
            })
            .collect();
        assert!((card.rate - values.len() as f64 / 320.0).abs() < 1e-12);
        assert!((card.max - values.iter().copied().fold(0.0, f32::max)).abs() < 1e-4);
        if !values.is_empty() {
            assert!((card.intervals.iter().map(|i| i.share).sum::<f32>() - 1.0).abs() < 1e-5);
        }
        for e in &card.top {
            assert!(e.values[e.at] > 0.0 && e.tokens.len() == e.values.len());
        }
        assert!(
            card.top
                .windows(2)
                .all(|w| w[0].values[w[0].at] >= w[1].values[w[1].at])
        );
    }
    add_sources(&model, &tokenizer, &sae, (1, &fired, 1), &mut cards, |_, _| ()).unwrap();
    assert!(
        cards
            .iter()
            .filter(|c| !c.top.is_empty())
            .all(|c| c.top[0].sources.is_some())
    );
    // The direct path: through W_o, the norm's weight and the output matrix, one row at a time.
    add_logits(&model, &tokenizer, &sae, 1, &mut cards);
    let logits = direct_logits(&model, 1, sae.direction(3), sae.d_in()).unwrap();
    let best = logits.iter().copied().fold(f32::MIN, f32::max);
    assert!((cards[3].raises[0].1 - best).abs() < 1e-5);
    // Attribution on the running model: keys and values of its cache, weights read off again.
    let tokens: Vec<u32> = (0..40).map(|i| (i * 13 + 2) % 250).collect();
    let wanted = [(39, vec![0, 5, 23]), (0, vec![1]), (20, Vec::new())];
    let given = attribute_text(&model, &sae, 1, &tokens, &wanted, 4).unwrap();
    assert!(given[2].len() <= 4);
    for a in given.iter().flatten() {
        let size = 1.0 + a.heads.iter().map(|x| x.abs()).sum::<f32>();
        assert!(a.rest_heads.abs() < 1e-5 * size, "{a:?}");
        // Values in the cache are bf16 where the kernel read them so, too.
        assert!(a.rest_sources.abs() < 1e-3 * size, "{} of {size}", a.rest_sources);
    }
}
