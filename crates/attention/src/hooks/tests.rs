use std::sync::Arc;

use super::*;

const SHAPE: HookShape = HookShape {
    layers: 3,
    heads: 4,
    kv_heads: 2,
    dim: 2,
    d_model: 6,
    d_ff: 10,
    vocab: 12,
};

fn spec(json: &str) -> HookSpec {
    serde_json::from_str(json).unwrap()
}

fn compile(json: &str) -> Result<HookPlan, HookError> {
    HookPlan::compile(&spec(json), SHAPE, &Sources::default())
}

fn message(json: &str) -> String {
    compile(json).unwrap_err().to_string()
}

/// Runs the hooks of `site` over rows at positions `pos0..` of a sequence with a prompt of 4 tokens.
fn apply(observer: &Observer, layer: usize, site: Site, pos0: u32, rows: &mut [f32]) {
    let width = site.width(&SHAPE);
    let watch = Watch::of(SHAPE.layers, [(Some(observer), rows.len() / width, pos0)]);
    if watch.wants(layer, site) {
        watch.at(layer, site, rows, width);
    }
}

#[test]
fn every_spelling_of_a_site_is_read_and_the_short_one_written() {
    for site in Site::ALL {
        let json = serde_json::to_string(&site).unwrap();
        assert_eq!(serde_json::from_str::<Site>(&json).unwrap(), site);
    }
    let site = |name: &str| name.parse::<SiteName>().map(|s| (s.site, s.layer));
    assert_eq!(site("blocks.12.attn.hook_z"), Ok((Site::Z, Some(12))));
    assert_eq!(site("hook_z"), Ok((Site::Z, None)));
    assert_eq!(site("blocks.0.attn.o.hook_in"), Ok((Site::Z, Some(0))));
    assert_eq!(site("hook_in"), Ok((Site::ResidPre, None)));
    assert_eq!(site("mlp.hook_out"), Ok((Site::MlpOut, None)));
    for wrong in [
        "",
        "hook",
        "blocks.x.hook_z",
        "blocks.1.hook_embed",
        "hook_post",
        "blocks.1",
    ] {
        assert!(site(wrong).is_err(), "{wrong}");
    }
    assert!(site("z").unwrap_err().to_string().contains("attn.hook_z"));
}

#[test]
fn a_specification_survives_json() {
    let text = r#"{"captures":[{"id":"c","at":{"site":"hook_resid_pre","positions":{"range":[2,5]}},"dtype":"bf16","before_edits":true}],
        "edits":[{"at":{"site":"attn.hook_z","layers":[1],"heads":[0,3],"positions":"answer"},"do":{"set":"zero"}},
                 {"at":{"site":"hook_mlp_out"},"do":{"add":{"what":{"row":[1,2,3,4,5,6]},"alpha":0.5}}},
                 {"at":{"site":"hook_embed"},"do":{"set":{"from":{"capture":"c","shift":-1}}}}],
        "on_hit":"new_only"}"#;
    let spec = spec(text);
    let again: HookSpec = serde_json::from_str(&serde_json::to_string(&spec).unwrap()).unwrap();
    assert_eq!(spec, again);
    assert!(
        serde_json::from_str::<HookSpec>(r#"{"capture":[]}"#).is_err(),
        "unknown fields"
    );
    assert!(
        serde_json::from_str::<HookSpec>(
            r#"{"edits":[{"at":{"site":"attn.hook_z"},"do":{"scale":1,"set":"zero"}}]}"#
        )
        .is_err()
    );
}

#[test]
fn what_does_not_fit_is_named() {
    let at = |cells: &str| format!(r#"{{"captures":[{{"at":{{{cells}}}}}]}}"#);
    let says = |json: String, part: &str| {
        let message = message(&json);
        assert!(message.contains(part), "{message}");
    };
    says(
        at(r#""site":"attn.hook_z","layers":[3]"#),
        "`attn.hook_z` in layer 3, the model has 3 layers",
    );
    says(
        at(r#""site":"attn.hook_k","heads":[2]"#),
        "head 2 of `attn.hook_k`, which has 2 heads",
    );
    says(at(r#""site":"hook_mlp_out","heads":[0]"#), "not made of heads");
    says(at(r#""site":"logits","layers":[0]"#), "exists once");
    let edit = |site: &str, action: &str| {
        format!(r#"{{"edits":[{{"at":{{"site":"{site}","layers":[0]}},"do":{action}}}]}}"#)
    };
    says(
        edit("attn.hook_z", r#"{"set":{"mean":[1]}}"#),
        "`attn.hook_z` has 1 values, 8 are needed",
    );
    says(
        edit("attn.hook_z", r#"{"set":{"from":{"capture":"x"}}}"#),
        "no capture `x` of blocks.0.attn.hook_z",
    );
    says(
        r#"{"edits":[{"at":{"site":"attn.hook_z","heads":[0,1]},"do":{"set":"zero"}},
                      {"at":{"site":"attn.hook_z","layers":[2],"heads":[1]},"do":{"set":"zero"}}]}"#
            .into(),
        "edits 0 and 1 both set blocks.2.attn.hook_z",
    );
    says(
        r#"{"captures":[{"at":{"site":"hook_embed"}},{"at":{"site":"hook_embed"}}]}"#.into(),
        "captured twice",
    );
    let mut infinite = spec(&edit("attn.hook_z", r#"{"scale":2}"#));
    infinite.edits[0].action = Action::Scale(f32::INFINITY);
    let error = HookPlan::compile(&infinite, SHAPE, &Sources::default()).unwrap_err();
    assert!(matches!(error, HookError::NotFinite { site: Site::Z }));
}

#[test]
fn sets_of_different_cells_do_not_contradict_each_other() {
    compile(
        r#"{"edits":[{"at":{"site":"attn.hook_z","heads":[0],"positions":{"range":[0,4]}},"do":{"set":"zero"}},
                     {"at":{"site":"attn.hook_z","heads":[0],"positions":{"list":[4,9]}},"do":{"set":"zero"}},
                     {"at":{"site":"attn.hook_z","heads":[1]},"do":{"set":"zero"}}]}"#,
    )
    .unwrap();
}

#[test]
fn edits_reach_their_heads_and_positions_and_nothing_else() {
    let plan = compile(
        r#"{"edits":[{"at":{"site":"attn.hook_z","layers":[1],"heads":[3,0],"positions":"answer"},"do":{"scale":0}},
                     {"at":{"site":"attn.hook_z","layers":[1],"heads":[2],"positions":"last"},"do":{"set":{"mean":[7,8]}}},
                     {"at":{"site":"attn.hook_z","layers":[1],"heads":[2],"positions":"generated"},"do":{"add":{"what":{"row":[1,2]},"alpha":-1}}}]}"#,
    )
    .unwrap();
    let observer = Observer::new(Arc::new(plan), 4, 0);
    let row = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0];
    let mut rows: Vec<f32> = row.repeat(3);
    apply(&observer, 1, Site::Z, 2, &mut rows);
    assert_eq!(rows[..8], row);
    assert_eq!(rows[8..16], [0.0, 0.0, 3.0, 4.0, 7.0, 8.0, 0.0, 0.0]);
    assert_eq!(rows[16..], [0.0, 0.0, 3.0, 4.0, 4.0, 4.0, 0.0, 0.0]);
    let mut other: Vec<f32> = row.repeat(3);
    apply(&observer, 0, Site::Z, 2, &mut other);
    assert_eq!(other, row.repeat(3), "another layer");
}

#[test]
fn values_come_from_another_run_with_a_shift() {
    let clean = Captured {
        id: "clean".into(),
        site: Site::ResidMid,
        layer: 0,
        heads: None,
        width: 6,
        positions: vec![1, 2],
        values: Values::F32((0..12).map(|x| x as f32).collect()),
    };
    let mut sources = Sources::default();
    sources.add([clean.clone()]);
    let spec = spec(
        r#"{"edits":[{"at":{"site":"hook_resid_mid","layers":[0]},"do":{"set":{"from":{"capture":"clean","shift":1}}}}]}"#,
    );
    let plan = HookPlan::compile(&spec, SHAPE, &sources).unwrap();
    let mut rows = vec![9.0; 18];
    apply(
        &Observer::new(Arc::new(plan.clone()), 4, 0),
        0,
        Site::ResidMid,
        1,
        &mut rows,
    );
    assert_eq!(
        rows[..6],
        [9.0; 6],
        "token 1 would come from token 0, which was not captured"
    );
    assert_eq!(
        rows[6..],
        [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0]
    );

    let mut others = Sources::default();
    others.add([Captured {
        values: Values::F32(vec![0.0; 12]),
        ..clean.clone()
    }]);
    let other = HookPlan::compile(&spec, SHAPE, &others).unwrap();
    assert_ne!(
        plan.fingerprint(),
        other.fingerprint(),
        "other values are another edit"
    );
    let mut narrow = Sources::default();
    narrow.add([Captured { width: 3, ..clean }]);
    assert!(matches!(
        HookPlan::compile(&spec, SHAPE, &narrow),
        Err(HookError::SourceWidth { got: 3, want: 6, .. })
    ));
}

#[test]
fn captures_see_edits_unless_asked_otherwise_and_keep_a_token_once() {
    let plan = compile(
        r#"{"captures":[{"at":{"site":"attn.hook_v","layers":[2],"heads":[1]}},
                        {"id":"raw","at":{"site":"attn.hook_v","layers":[2],"heads":[1],"positions":{"range":[1,9]}},"before_edits":true,"dtype":"bf16"}],
            "edits":[{"at":{"site":"attn.hook_v","layers":[2]},"do":{"scale":2}}]}"#,
    )
    .unwrap();
    assert_eq!(plan.capture_bytes(3, 1), 4 * 8 + 3 * 4);
    assert!(plan.check_cap(3, 31).is_err() && plan.check_cap(3, 32).is_ok());
    let observer = Observer::new(Arc::new(plan), 2, 1 << 20);
    let mut rows: Vec<f32> = (0..8).map(|x| x as f32).collect();
    apply(&observer, 2, Site::V, 0, &mut rows);
    // The second token comes again, with another value, and a third.
    let mut rows = vec![0.0, 0.0, 50.0, 51.0, 0.0, 0.0, 60.0, 61.0];
    apply(&observer, 2, Site::V, 1, &mut rows);
    let got = observer.take();
    let find = |id: &str| got.iter().find(|c| c.id == id).unwrap();
    assert_eq!(find("").positions, [0, 1, 2]);
    assert_eq!(find("").to_f32(), [4.0, 6.0, 100.0, 102.0, 120.0, 122.0]);
    assert_eq!(find("raw").positions, [1, 2]);
    assert_eq!(find("raw").row(1), Some(vec![50.0, 51.0]));
    assert_eq!(find("raw").row(0), None);
    assert_eq!(find("raw").name(), "raw/blocks.2.attn.hook_v");
    assert!(
        observer.take().iter().all(|c| c.positions.is_empty()),
        "nothing is left behind"
    );
}

#[test]
fn nothing_is_kept_beyond_the_limit_and_it_is_said() {
    let plan = compile(r#"{"captures":[{"at":{"site":"hook_embed"}}]}"#).unwrap();
    let observer = Observer::new(Arc::new(plan), 9, 48);
    apply(&observer, 0, Site::Embed, 0, &mut [1.0; 6 * 5]);
    assert_eq!(observer.dropped(), 3);
    assert_eq!(observer.take()[0].positions, [0, 1]);
}

#[test]
fn only_edits_have_a_fingerprint() {
    let print = |json: &str| compile(json).unwrap().fingerprint();
    assert_eq!(print("{}"), 0);
    assert_eq!(print(r#"{"captures":[{"at":{"site":"hook_embed"}}]}"#), 0);
    let scale = |x: f32| format!(r#"{{"edits":[{{"at":{{"site":"attn.hook_z"}},"do":{{"scale":{x}}}}}]}}"#);
    assert_eq!(print(&scale(1.0)), 0, "an edit that changes nothing is left out");
    assert_ne!(print(&scale(0.5)), 0);
    assert_ne!(print(&scale(0.5)), print(&scale(0.25)));
    assert_eq!(print(&scale(0.5)), print(&scale(0.5)));
    let plan = compile(&scale(0.5)).unwrap();
    assert_ne!(plan.salted(3), 3);
    assert_ne!(plan.salted(3), plan.salted(4));
    assert_eq!(compile("{}").unwrap().salted(3), 3);
}

/// Adds one to every row it sees, and counts calls.
struct PlusOne(Arc<std::sync::atomic::AtomicUsize>);

impl Hook for PlusOne {
    fn wants(&self, layer: usize) -> u32 {
        if layer == 1 { Site::ResidPost.bit() } else { 0 }
    }
    fn fingerprint(&self) -> Option<u64> {
        Some(1)
    }
    fn at(&mut self, at: &At<'_>, rows: &mut [f32]) {
        assert_eq!(
            (at.layer, at.site, at.rows * at.width),
            (1, Site::ResidPost, rows.len())
        );
        self.0.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        rows.iter_mut().for_each(|x| *x += 1.0);
    }
}

#[test]
fn code_runs_where_it_wants_and_keeps_its_pages_apart() {
    let calls = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let plan = Arc::new(compile("{}").unwrap());
    let observer = Observer::new(Arc::clone(&plan), 1, 0).with(Box::new(PlusOne(Arc::clone(&calls))));
    let mut rows = vec![0.0; 12];
    apply(&observer, 1, Site::ResidPost, 0, &mut rows);
    apply(&observer, 2, Site::ResidPost, 0, &mut rows);
    assert_eq!(rows, [1.0; 12]);
    assert_eq!(calls.load(std::sync::atomic::Ordering::Relaxed), 1);
    assert_ne!(observer.salted(5), Observer::new(plan, 1, 0).salted(5));
}

#[test]
fn rows_of_neighbours_and_left_out_rows_stay_untouched() {
    let plan =
        Arc::new(compile(r#"{"edits":[{"at":{"site":"hook_resid_post"},"do":{"set":"zero"}}]}"#).unwrap());
    let observer = Observer::new(plan, 3, 0);
    let mut watch = Watch::of(3, [(None, 2, 0), (Some(&observer), 3, 0), (None, 1, 7)]);
    assert!(watch.wants(2, Site::ResidPost) && !watch.wants(2, Site::ResidPre));
    assert!(watch.wants_any(1, 2, &[Site::Z, Site::ResidPost]) && !watch.wants_any(0, 2, &[Site::ResidPost]));
    let mut rows = vec![1.0; 36];
    watch.at(0, Site::ResidPost, &mut rows, 6);
    assert_eq!(rows.iter().map(|&x| x as usize).sum::<usize>(), 18);
    assert_eq!(rows[12..30], [0.0; 18]);
    watch.narrow(&[1, 1, 1]);
    let mut rows = vec![1.0; 18];
    watch.at(2, Site::ResidPost, &mut rows, 6);
    assert_eq!(rows[..6], [1.0; 6]);
    assert_eq!(rows[6..12], [0.0; 6]);
    assert_eq!(rows[12..], [1.0; 6]);
}
