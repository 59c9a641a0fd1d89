//! Planned prompts and the cache of prefixes: whole stretches are found again, under the planner's own settings only.

use std::num::NonZeroUsize;
use std::sync::Arc;

use antefix_attention::method::{
    Axis, Card, Chosen, Cover, Kind, Knob, Knobs, Method, Paper, Plan, PlanView, Planner, Preset, Profiles,
    Program, Rig, RigError, Unit, Value,
};
use antefix_conformance::tiny;
use antefix_engine::{Beside, Budget, Engine, Event, MethodReport, Options, RawJob};
use antefix_kernels::cpu::Cpu;
use antefix_models::spec::Arch;

const GRAIN: usize = 48;

static CARD: Card = Card {
    name: "ends",
    title: "Ends",
    axis: Axis::Prefill,
    exact: false,
    summary: "For tests.",
    paper: Paper {
        title: "None",
        authors: "no one",
        year: 2026,
        reference: "none",
    },
    knobs: &[Knob {
        name: "window",
        kind: Kind::int(0, 1000),
        default: Preset::Int(16),
        unit: "keys",
        help: "Keys before the block",
        source: "ours",
    }],
    query_dependent: false,
    needs: &[],
    neutral: None,
    source: file!(),
};

struct Ends;

impl Method for Ends {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn install(&self, knobs: &Knobs, rig: &mut Rig<'_>) -> Result<(), RigError> {
        rig.set_planner(Arc::new(Window(knobs.size("window") as u32)))
    }
}

#[derive(Debug)]
struct Window(u32);

impl Planner for Window {
    fn grain(&self) -> NonZeroUsize {
        NonZeroUsize::MIN.saturating_add(GRAIN - 1)
    }

    fn plan(&self, view: &PlanView<'_>) -> Plan {
        view.plan(Unit::KvGroup, |_| Cover::a_shape(16, view.queries(), 2, self.0))
    }
}

fn engine(arch: Arch) -> Engine {
    let (model, tokenizer) = tiny(arch, Cpu::best(), 2);
    let options = Options {
        kv_bytes: 1 << 28,
        context: usize::MAX,
        budget: Budget {
            rows: 10,
            beside_decode: Beside::Rows(3),
        },
    };
    Engine::new(model, tokenizer, options)
}

fn request(engine: &Engine, tokens: usize, window: Option<i64>) -> RawJob {
    let program = window.map(|window| {
        let given = [("window".to_string(), Value::Int(window))].into();
        let chosen = [Chosen {
            method: &Ends,
            knobs: Knobs::new(&CARD, &given).expect("in range"),
        }];
        Arc::new(Rig::assemble(&engine.model().facts(), &Profiles::default(), &chosen).expect("it goes"))
    });
    RawJob {
        tokens: (0..tokens).map(|i| (i * 7 + 3) as u32 % 200).collect(),
        max_tokens: Some(3),
        ignore_eos: true,
        want_logits: true,
        program: program as Option<Arc<Program>>,
        ..RawJob::default()
    }
}

/// Tokens found in the cache, logits, and what the methods say.
fn run(engine: &mut Engine, raw: RawJob) -> (usize, Vec<Vec<f32>>, Option<Box<MethodReport>>) {
    let job = engine.job(raw).expect("valid");
    engine.submit(job).expect("it fits");
    let (mut cached, mut all, mut report) = (0, Vec::new(), None);
    for event in engine.run().expect("it runs") {
        match event {
            Event::Token {
                logits: Some(logits), ..
            } => all.push(logits),
            Event::End { usage, method, .. } => (cached, report) = (usage.cached_tokens, method),
            _ => {}
        }
    }
    (cached, all, report)
}

#[test]
fn whole_stretches_are_found_again_under_the_same_settings_only() {
    let mut e = engine(Arch::Llama);
    let ask = |e: &mut Engine, tokens, window| {
        let raw = request(e, tokens, window);
        run(e, raw)
    };
    let (_, dense, _) = ask(&mut engine(Arch::Llama), 250, None);
    let (cached, planned, report) = ask(&mut e, 250, Some(16));
    assert_eq!(cached, 0);
    let plan = report.and_then(|r| r.plan).expect("it was planned");
    let density = plan.density.expect("of the prompt");
    assert!(
        density > 0.1 && density < 0.6 && plan.decode_density.is_none(),
        "{plan:?}"
    );
    // Of 250 tokens 192 are whole stretches of 48 in whole pages of 32.
    let (cached, again, _) = ask(&mut e, 250, Some(16));
    assert_eq!(cached, 192);
    assert!(again == planned && planned != dense);
    // A longer prompt that starts so: the rest of the first one was planned for its own end.
    let (cached, longer, _) = ask(&mut e, 300, Some(16));
    assert_eq!(cached, 192);
    assert!(longer == ask(&mut engine(Arch::Llama), 300, Some(16)).1);
    // Neither dense requests nor other settings see any of it.
    let (cached, logits, report) = ask(&mut e, 250, None);
    assert_eq!((cached, report), (0, None));
    assert!(logits == dense);
    let (cached, other, _) = ask(&mut e, 250, Some(64));
    assert_eq!(cached, 0);
    assert!(other != planned);
}

#[test]
fn layers_with_a_window_are_not_planned() {
    // Of Gemma's layers some have a window: the density is that of the others.
    let mut e = engine(Arch::Gemma3);
    let raw = request(&e, 250, Some(0));
    let (_, _, report) = run(&mut e, raw);
    let got = report.and_then(|r| r.plan?.density).expect("it was planned");
    let kept: u64 = (0..250u64).map(|p| p % 16 + 1 + if p < 16 { 0 } else { 2 }).sum();
    let want = kept as f64 / (250.0 * 251.0 / 2.0);
    assert!((got - want).abs() < 1e-9, "{got} {want}");
}
