//! Choosing and installing, with two made-up methods.

use std::sync::Arc;

use super::*;

/// Doubles the prompt.
#[derive(Debug)]
struct Twice;

impl PromptPass for Twice {
    fn rewrite(&self, mut prompt: Prompt, _: &dyn Words) -> Prompt {
        prompt.tokens.extend_from_within(..);
        prompt
    }
}

struct Words0;

impl Words for Words0 {
    fn encode(&self, _: &str) -> Vec<u32> {
        Vec::new()
    }
}

const fn card(name: &'static str, axis: Axis, knobs: &'static [Knob]) -> Card {
    Card {
        name,
        title: "Example",
        axis,
        exact: false,
        summary: "An example.",
        paper: Paper {
            title: "None",
            authors: "Nobody",
            year: 2026,
            reference: "none",
        },
        knobs,
        query_dependent: false,
        needs: &[],
        neutral: None,
        source: file!(),
    }
}

struct Repeat;

impl Method for Repeat {
    fn card(&self) -> &'static Card {
        static CARD: Card = card("repeat", Axis::Context, &[]);
        &CARD
    }

    fn install(&self, _: &Knobs, rig: &mut Rig<'_>) -> Result<(), RigError> {
        rig.add_prompt_pass(Arc::new(Twice));
        Ok(())
    }
}

/// A geometry under a name and on an axis of one's choice: two of them want the same seam.
struct Stretched(&'static Card);

static STRETCH: Card = card(
    "stretch",
    Axis::Geometry,
    &[Knob {
        name: "factor",
        kind: Kind::float(1.0, 8.0),
        default: Preset::Float(2.0),
        unit: "",
        help: "How much longer",
        source: "ours",
    }],
);
static HEADS: Card = card(
    "heads",
    Axis::Hooks,
    &[Knob {
        name: "profile",
        kind: Kind::Profile,
        default: Preset::Text(""),
        unit: "",
        help: "Which heads",
        source: "ours",
    }],
);

impl Method for Stretched {
    fn card(&self) -> &'static Card {
        self.0
    }

    fn install(&self, knobs: &Knobs, rig: &mut Rig<'_>) -> Result<(), RigError> {
        if self.0.name == "heads" && !knobs.text("profile").is_empty() {
            rig.profile("heads", knobs.text("profile"), "make one")?;
        }
        let factor = if self.0.name == "stretch" {
            knobs.float("factor")
        } else {
            3.0
        };
        let context = rig.facts().context;
        rig.set_stretch(Stretch {
            steps: vec![
                (context, Rotation::default()),
                (
                    (context as f64 * factor) as usize,
                    Rotation {
                        freq: Freq::Ntk { factor },
                        ..Rotation::default()
                    },
                ),
            ],
        })
    }
}

static KNOWN: &[&dyn Method] = &[&Repeat, &Stretched(&STRETCH), &Stretched(&HEADS)];

fn raw(texts: &[&str]) -> Result<RawMethods, ChoiceError> {
    let mut raw = RawMethods::default();
    texts.iter().try_for_each(|text| raw.add(KNOWN, text))?;
    Ok(raw)
}

fn chosen(texts: &[&str]) -> Result<Vec<Chosen>, ChoiceError> {
    raw(texts)?.resolve(KNOWN, Trust::Local)
}

fn program(texts: &[&str]) -> Result<Program, RigError> {
    Rig::assemble(&Facts::example(), &Profiles::default(), &chosen(texts).unwrap())
}

#[test]
fn the_three_forms_mean_the_same() {
    let text = chosen(&["stretch,factor=4"]).unwrap();
    for form in [
        r#"{"geometry": "stretch,factor=4"}"#,
        r#"{"geometry": {"name": "stretch", "factor": 4}}"#,
        r#"{"geometry": {"name": "stretch", "factor": 4.0}}"#,
    ] {
        assert_eq!(
            format!("{:?}", chosen(&[form]).unwrap()),
            format!("{text:?}"),
            "{form}"
        );
    }
    let both = chosen(&["repeat", "stretch"]).unwrap();
    assert_eq!(both.len(), 2);
}

#[test]
fn wrong_choices_say_what_would_be_right() {
    for (texts, hint) in [
        (&["strech"][..], "choose from repeat, stretch, heads"),
        (&["stretch,factr=1"], "choose from factor"),
        (&["stretch,factor=9"], "1 to 8"),
        (&[",factor=9"], "names no method"),
        (&["stretch,factor"], "names no method"),
        (&["stretch", "stretch"], "both methods of the axis `geometry`"),
        (&[r#"{"kv": "stretch"}"#], "write it under `geometry`"),
        (&[r#"{"where": "stretch"}"#], "unknown variant `where`"),
        (&[r#"{"geometry": 7}"#], "NAME,knob=value"),
        (&[r#"{"geometry": {"factor": 7}}"#], "a table with `name`"),
        (&["{"], "EOF"),
    ] {
        let error = chosen(texts).unwrap_err().to_string();
        assert!(error.contains(hint), "{texts:?}: {error}");
    }
}

#[test]
fn defaults_hold_where_a_request_says_nothing_and_dense_turns_them_off() {
    let defaults = raw(&["repeat", "stretch"]).unwrap();
    let asked: RawMethods = serde_json::from_str(r#"{"geometry": "dense"}"#).unwrap();
    let chosen = asked.or(&defaults).resolve(KNOWN, Trust::Remote).unwrap();
    assert_eq!(chosen.len(), 1);
    assert_eq!(chosen[0].card().name, "repeat");
}

#[test]
fn files_are_named_by_whoever_started_the_process_only() {
    let asked = raw(&["heads,profile=../../etc/passwd"]).unwrap();
    let refused = asked.resolve(KNOWN, Trust::Remote).unwrap_err().to_string();
    assert!(refused.contains("letters, digits"), "{refused}");
    assert!(
        raw(&["heads,profile=smollm2-1.0"])
            .unwrap()
            .resolve(KNOWN, Trust::Remote)
            .is_ok()
    );
    let missing = Rig::assemble(
        &Facts::example(),
        &Profiles::named_in(vec!["/nowhere".into()]),
        &asked.resolve(KNOWN, Trust::Local).unwrap(),
    );
    let text = missing.unwrap_err().to_string();
    assert!(
        text.contains("/nowhere/heads") && text.contains("hint: make one"),
        "{text}"
    );
}

#[test]
fn a_name_is_a_path_only_where_that_is_allowed() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("heads")).unwrap();
    std::fs::write(folder.path().join("heads/a.json"), "there").unwrap();
    std::fs::write(folder.path().join("own"), "mine").unwrap();
    let own = folder.path().join("own").display().to_string();
    let profiles = Profiles::named_in(vec![folder.path().to_owned()]);
    assert_eq!(profiles.read("heads", "a").unwrap(), "there");
    assert!(profiles.read("heads", &own).unwrap_err().contains("is not in"));
    assert_eq!(
        profiles.folder("heads", &folder.path().display().to_string()),
        None
    );
    let local = profiles.or_paths();
    assert_eq!(local.read("heads", &own).unwrap(), "mine");
    assert!(
        local
            .folder("heads", &folder.path().display().to_string())
            .is_some()
    );
}

#[test]
fn a_program_carries_what_was_installed() {
    let program = program(&["stretch", "repeat"]).unwrap();
    assert_eq!(program.tag(), "repeat + stretch,factor=2");
    assert_eq!(
        program.rewrite(Prompt::plain(vec![1, 2]), &Words0).tokens,
        [1, 2, 1, 2]
    );
    assert_eq!((program.context(4096), program.is_exact()), (8192, false));
    assert!(program.rotation(4096).is_none() && program.rotation(4097).is_some());
    let dense = Program::default();
    assert!(dense.is_exact() && dense.is_dense() && dense.tag() == "dense" && dense.context(7) == 7);
    assert_ne!(program.fingerprint(), dense.fingerprint());
}

#[test]
fn two_methods_on_one_seam_are_refused_with_both_names() {
    let error = program(&["heads", "stretch"]).unwrap_err().to_string();
    assert!(
        error.contains("`stretch` and `heads`") && error.contains("angles"),
        "{error}"
    );
}

#[test]
fn a_page_has_the_card_and_the_fixed_headings() {
    let mut source = String::from("//! stretch: longer.\n//!\n");
    for heading in HEADINGS {
        source += &format!("//! # {heading}\n//! Text of {heading}.\n//!\n");
    }
    source += "\nfn f() {}\n";
    let text = page(&STRETCH, &source).unwrap();
    assert!(
        text.contains("| `factor` | 1 to 8 | `2` | How much longer | ours |"),
        "{text}"
    );
    assert!(
        text.contains("## Cost\nText of Cost.") && !text.contains("fn f"),
        "{text}"
    );
    assert!(page(&STRETCH, "//! # Steps\n").unwrap_err().contains("headings"));
    assert_eq!(card_json(&STRETCH)["knobs"][0]["default"], 2.0);
    let page = index(KNOWN, &[KNOWN[0].card()], &[KNOWN[1].card()]);
    assert!(page.contains("[stretch](stretch.md)") && page.contains("\n## Always\n"));
    assert!(page.contains("\n## Trained\n"));
}
