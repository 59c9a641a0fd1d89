//! Every kind of data and objective as a tiny recipe, and laws of single kinds.
#![allow(clippy::format_collect, reason = "a few short lines of test data")]

use std::path::Path;

use antefix_models::spec::Arch;
use antefix_models::testing::{Meta, tiny_builder};

use super::*;

/// Overrides of [`TINY`], one list a kind; their files are written into `dir`.
pub(super) fn all(dir: &Path) -> Vec<Vec<String>> {
    let file = |name: &str, bytes: &[u8]| {
        let path = dir.join(name);
        std::fs::write(&path, bytes).unwrap();
        path.display().to_string()
    };
    let pairs: String = (0..12)
        .map(|i| {
            format!(
                "{{\"prompt\": \"{i}+1=\", \"chosen\": \"{}\", \"rejected\": \"x{i}\"}}\n",
                i + 1
            )
        })
        .collect();
    let pairs = file("pairs.jsonl", pairs.as_bytes());
    let chats: String = (0..12)
        .map(|i| {
            format!(
                "{{\"messages\": [{{\"role\": \"user\", \"content\": \"{i}\"}}, {{\"role\": \"assistant\", \"content\": \"yes {i}\"}}]}}\n\n"
            )
        })
        .collect();
    let chats = file("chats.jsonl", chats.as_bytes());
    let template = file(
        "chat.jinja",
        b"{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
    );
    let ids: Vec<u8> = (0..2000u32)
        .flat_map(|i| ((i * i % 251) as u16).to_le_bytes())
        .collect();
    let ids = file("ids.bin", &ids);
    let own = |data: String| vec![data, "train.eval_items=4".to_string()];
    vec![
        own(format!(
            "data={{source='tokens', files=['{ids}'], seq=16, val=0.1}}"
        )),
        own(format!(
            "data={{source='chat', file='{chats}', template='{template}', val=0.2}}"
        )),
        vec![
            format!("data={{source='preferences', file='{pairs}', val=0.2}}"),
            "objective={name='dpo', label_smoothing=0.1}".into(),
            "train.micro=4".into(),
        ],
        vec![
            "data={source='synthetic', task={name='mqar', vocab=16, pairs=2, length=12}}".into(),
            "model={kind='gpt', layers=1, d=32, heads=2, kv_heads=2, ffn=48, vocab=16, context=12}".into(),
        ],
        own("data={source='synthetic', task={name='copy', vocab=16, length=4}}".into()),
        own("data={source='synthetic', task={name='induction', vocab=16, length=9}}".into()),
        own("data={source='task', task={name='passkey', digits=2, filler=1}}".into()),
        own("train.served={items=3, format='q8_0'}".to_string()),
        vec![
            "data={source='task', task={name='passkey', digits=2, filler=1}}".into(),
            "objective={name='grpo', group=2, max_tokens=3}".into(),
            "train.batch=2".into(),
        ],
    ]
}

fn held_out(finish: &Finish, name: &str) -> f64 {
    let found = finish.held_out.iter().find(|(n, _)| n == name);
    found
        .unwrap_or_else(|| panic!("no `{name}` in {:?}", finish.held_out))
        .1
}

/// A model that has learned nothing answers as often as chance has it; one that has learned to look back answers nearly always.
#[test]
fn a_small_gpt_learns_to_copy() {
    let data = "data={source='synthetic', task={name='copy', vocab=16, length=8}}";
    let model = "model={kind='gpt', layers=2, d=64, heads=2, kv_heads=2, ffn=128, vocab=16, context=17}";
    let dir = tempfile::tempdir().unwrap();
    let after = |steps: &str, out: &str| {
        let overrides = [
            data,
            model,
            steps,
            "train.batch=32",
            "train.eval_items=256",
            "optim.lr=3e-3",
            "optim.decay=0.0",
            "schedule.warmup=1",
        ];
        let finish = run(&recipe(&overrides).unwrap(), &dir.path().join(out), false, None).unwrap();
        [held_out(&finish, "accuracy"), held_out(&finish, "answers")]
    };
    let [first, _] = after("train.steps=1", "first");
    assert!(first < 0.2, "{first} of answers right without having learned any");
    let [accuracy, answers] = after("train.steps=120", "last");
    assert!(
        accuracy > 0.95 && answers > 0.8,
        "accuracy {accuracy}, whole copies {answers}"
    );
    assert!(answers <= accuracy);
}

/// Preferences that a program can check: the chosen answer is the sum. The margin on held-out pairs rises and the pairs come out right.
#[test]
fn preferences_are_learned() {
    let dir = tempfile::tempdir().unwrap();
    let lines: String = (0..200)
        .map(|i| {
            let (a, b) = (i % 10, (i * 7 + i / 10) % 10);
            format!("{{\"prompt\": \"say {a}{b}:\", \"chosen\": \"yes {a}\", \"rejected\": \"no {b}\"}}\n")
        })
        .collect();
    let file = dir.path().join("pairs.jsonl");
    std::fs::write(&file, lines).unwrap();
    let data = format!(
        "data={{source='preferences', file='{}', val=0.2}}",
        file.display()
    );
    let of = |objective: &str, out: &str| {
        let overrides = [data.as_str(), objective, "train.steps=30", "train.eval_items=40"];
        run(&recipe(&overrides).unwrap(), &dir.path().join(out), false, None).unwrap()
    };
    for objective in [
        "objective={name='dpo'}",
        "objective={name='dpo', reference='none'}",
    ] {
        let finish = of(objective, objective);
        assert!(
            held_out(&finish, "preference accuracy") == 1.0,
            "{:?}",
            finish.held_out
        );
        assert!(held_out(&finish, "reward margin") > 0.1, "{:?}", finish.held_out);
        assert!(held_out(&finish, "preference loss") < 2f64.ln() - 0.05);
    }
    let metrics = std::fs::read_to_string(dir.path().join("objective={name='dpo'}/metrics.jsonl")).unwrap();
    let first: serde_json::Value = metrics
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .find(|v: &serde_json::Value| v["t"] == "step")
        .unwrap();
    assert!(
        first["margin"].as_f64().unwrap().abs() < 1e-6,
        "before the first step the policy is its reference: {first}"
    );
    assert!((first["loss"].as_f64().unwrap() - 2f64.ln()).abs() < 1e-6);
    assert!(
        first["reward_chosen"].is_f64() && first["reward_rejected"].is_f64() && first["accuracy"].is_f64()
    );
}

#[test]
fn broken_lines_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("lines.jsonl");
    let template = dir.path().join("t.jinja");
    std::fs::write(&template, "{{ messages[-1].content }}").unwrap();
    let cases = [
        (
            "preferences",
            "{\"prompt\": \"a\", \"chosen\": \"b\"}",
            "line 2: missing field `rejected`",
        ),
        (
            "preferences",
            "{\"prompt\": \"a\", \"chosen\": \"b\", \"rejected\": \"b\"}",
            "line 2: a prompt and two different",
        ),
        ("preferences", "not json", "line 2"),
        (
            "chat",
            "{\"messages\": []}",
            "line 2: nothing in it is said by the assistant",
        ),
        (
            "chat",
            "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}, {\"role\": \"assistant\", \"content\": \"b\"}]}",
            "line 2: the template does not put message 2",
        ),
    ];
    for (source, line, says) in cases {
        std::fs::write(&file, format!("\n{line}\n")).unwrap();
        let template = match source {
            "chat" => format!(", template='{}'", template.display()),
            _ => String::new(),
        };
        let data = format!("data={{source='{source}', file='{}'{template}}}", file.display());
        let objective = match source {
            "chat" => "objective={name='ce'}",
            _ => "objective={name='dpo'}",
        };
        let out = dir.path().join("run");
        let error = run(&recipe(&[&data, objective]).unwrap(), &out, false, None)
            .unwrap_err()
            .to_string();
        assert!(error.contains(says) && error.contains("lines.jsonl"), "{error}");
    }
    let data = format!("data={{source='chat', file='{}'}}", file.display());
    let error = run(&recipe(&[&data]).unwrap(), &dir.path().join("run"), false, None)
        .unwrap_err()
        .to_string();
    assert!(error.contains("data.template"), "{error}");
    let data = "data={source='synthetic', task={name='copy', vocab=300, length=4}}";
    let error = run(&recipe(&[data]).unwrap(), &dir.path().join("run"), false, None)
        .unwrap_err()
        .to_string();
    assert!(error.contains("300") && error.contains("256"), "{error}");
}

/// A base model brings its own template and its own tokenizer: the text that is trained on is what the template makes, and only the
/// assistant's part of it is scored.
#[test]
fn a_base_model_renders_chats_with_its_own_template() {
    let dir = tempfile::tempdir().unwrap();
    let template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}";
    let base = dir.path().join("base.gguf");
    let built = tiny_builder(Arch::Llama, 3)
        .replace("tokenizer.chat_template", Meta::Str(template.into()))
        .build();
    std::fs::write(&base, built).unwrap();
    let chats = dir.path().join("chats.jsonl");
    let line =
        r#"{"messages": [{"role": "user", "content": "hey"}, {"role": "assistant", "content": "you"}]}"#;
    std::fs::write(&chats, format!("{line}\n{line}\n")).unwrap();
    let data = format!(
        "data={{source='chat', file='{}', tokenizer='model', val=0.5}}",
        chats.display()
    );
    let model = format!("model={{kind='base', path='{}'}}", base.display());
    let recipe = recipe(&[&data, &model, "train.steps=2"]).unwrap();
    let (model, tokens) = super::super::model::build(&recipe).unwrap();
    let data = super::super::data::Data::open(&recipe, &tokens, &model).unwrap();
    let super::super::data::Items::Marked(items) =
        data.items(3, super::super::data::Part::Train, 0, 1, &tokens)
    else {
        panic!("chats are marked sequences")
    };
    let scored = |wanted: bool| -> Vec<u32> {
        let all = items[0].tokens.iter().zip(&items[0].scored);
        all.filter(|(_, s)| **s == wanted).map(|(t, _)| *t).collect()
    };
    assert!(tokens.decode(&scored(false)).ends_with("[user]hey\n[assistant]"));
    assert_eq!(tokens.decode(&scored(true)).trim(), "you");
    assert!(
        run(&recipe, &dir.path().join("run"), false, None)
            .unwrap()
            .complete
    );
}

/// What the engine says of held-out data is what the trainer says: nearly so with its own weights, less so with rounded ones.
#[test]
fn a_look_through_the_engine_sees_what_the_trainer_sees() {
    let dir = tempfile::tempdir().unwrap();
    let text: String = (0..1500).map(|i| format!("{} ", i * i % 97)).collect();
    let file = dir.path().join("text.txt");
    std::fs::write(&file, text).unwrap();
    let data = format!(
        "data={{source='text', files=['{}'], seq=40, val=0.1}}",
        file.display()
    );
    let looked = |served: &str| {
        let overrides = [
            data.as_str(),
            served,
            "train.steps=30",
            "train.eval_every=10",
            "train.eval_items=6",
        ];
        let out = dir.path().join(served);
        let finish = run(&recipe(&overrides).unwrap(), &out, false, None).unwrap();
        let lines = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
        assert_eq!(lines.matches("served agreement").count(), 3);
        let names = ["cross-entropy", "served perplexity", "served agreement"];
        names.map(|name| held_out(&finish, name))
    };
    let [nats, served, agreement] = looked("train.served={items=6}");
    assert!((served.ln() - nats).abs() < 0.01, "{served} and e^{nats}");
    assert!(agreement > 0.97, "{agreement}");
    let [nats, rounded, agreement] = looked("train.served={items=6, format='q8_0'}");
    assert!((rounded.ln() - nats).abs() < 0.05 && agreement > 0.9);
    assert!((rounded - served).abs() > 1e-9, "rounding is seen");
    let gpt = [
        "model={kind='gpt', layers=1, d=32, heads=2, kv_heads=2, ffn=48}",
        "train.served={items=6}",
    ];
    assert!(recipe(&gpt).unwrap_err().to_string().contains("train.served"));
}
