//! Chat templates: Jinja out of a model file, run with limits, because the file is not trusted.

mod guard;
mod meter;

use std::collections::BTreeMap;

use minijinja::machinery::{self, CodeGenerator, Instructions};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Serde, Value};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, context};
use serde::{Deserialize, Serialize};

use crate::error::shown;
use crate::files::ModelFiles;

/// Bytes of a template's source: real ones have up to 20 kB.
const MAX_SOURCE: usize = 64 << 10;

/// Fuel for whatever a template does besides the messages. A unit is an instruction or 64 bytes of data; real templates take
/// a few hundred. The fuel bounds time, memory and, through [`STACK_PER_FUEL`], how deep lists can be nested.
const FUEL: u64 = 100_000;

/// Fuel for each message: real templates take up to a hundred.
const FUEL_PER_MESSAGE: u64 = 2_000;

/// Bytes of messages and tools that bring a unit of fuel: each byte may be copied 16 times.
const BYTES_PER_FUEL: u64 = 4;

/// The most fuel of one conversation.
const MAX_FUEL: u64 = 2_000_000;

/// Stack of the thread that compiles. A chain such as `a|f|f` takes a level for every two bytes of source.
const STACK_PER_BYTE: usize = 4 << 10;

/// Stack of the thread that renders. A list in a list takes at least 1.5 units of fuel to make, and dropping or printing such a
/// list recurses once a level. Only what is used of it is ever in memory.
const STACK_PER_FUEL: usize = 2 << 10;

/// Nesting of calls and includes.
const RECURSION: usize = 100;

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant` or `tool`.
    pub role: String,
    /// Its text.
    pub content: String,
    /// What else the template may look at: `tool_calls`, `tool_call_id`, `name` ...
    #[serde(flatten)]
    pub extra: serde_json::Map<String, serde_json::Value>,
}

impl Message {
    /// A message of `role`.
    pub fn new(role: &str, content: impl Into<String>) -> Self {
        Self {
            role: role.to_string(),
            content: content.into(),
            extra: serde_json::Map::new(),
        }
    }
}

/// Why a conversation could not be turned into a prompt.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[expect(missing_docs, reason = "the messages say what the fields are")]
pub enum TemplateError {
    #[error("the model's chat template cannot be read: {0}")]
    Syntax(String),
    #[error("the model's chat template refuses this conversation: {0}")]
    Refused(String),
    #[error("the model's chat template failed: {0}\nhint: use --raw to send the prompt without it")]
    Failed(String),
    #[error(
        "the model's chat template does more work than {messages} messages can need\nhint: use --raw to send the prompt without it"
    )]
    TooMuch { messages: usize },
}

/// A chat template. Compiling takes far less than a millisecond, so that only its source is kept.
pub struct ChatTemplate {
    env: Environment<'static>,
    source: String,
    bos: String,
    eos: String,
}

impl ChatTemplate {
    /// Compiles `source`; `bos` and `eos` are the texts of those tokens.
    ///
    /// # Errors
    /// On a syntax error.
    pub fn new(source: &str, bos: &str, eos: &str) -> Result<Self, TemplateError> {
        if source.len() > MAX_SOURCE {
            let what = format!("it has {} bytes, at most {MAX_SOURCE} are read", source.len());
            return Err(TemplateError::Syntax(what));
        }
        let env = environment();
        on_stack(compile_stack(source), || compile(source).map(drop))?;
        Ok(Self {
            env,
            source: source.to_string(),
            bos: bos.to_string(),
            eos: eos.to_string(),
        })
    }

    /// The template of a model file or folder, if it has one.
    ///
    /// # Errors
    /// On a syntax error.
    pub fn open(files: &ModelFiles, bos: &str, eos: &str) -> Result<Option<Self>, TemplateError> {
        let source = match files.gguf() {
            Some(gguf) => gguf.str("tokenizer.chat_template").map(str::to_string),
            None => folder_template(files.dir()),
        };
        source.map(|s| Self::new(&s, bos, eos)).transpose()
    }

    /// The prompt of a conversation; `generate` opens the assistant's turn.
    ///
    /// # Errors
    /// When the template refuses, fails or runs over its limits.
    pub fn render(
        &self,
        messages: &[Message],
        tools: Option<&serde_json::Value>,
        generate: bool,
    ) -> Result<String, TemplateError> {
        let bytes: usize = messages.iter().map(|m| m.role.len() + m.content.len()).sum();
        let bytes = bytes + tools.map_or(0, |tools| tools.to_string().len());
        let fuel = FUEL + messages.len() as u64 * FUEL_PER_MESSAGE + bytes as u64 / BYTES_PER_FUEL;
        let fuel = fuel.min(MAX_FUEL);
        let mut env = self.env.clone();
        env.set_fuel(Some(fuel));
        let job = || {
            let context = context! {
                messages => Value::from(Serde(messages)),
                tools => Value::from(Serde(tools)),
                add_generation_prompt => generate,
                bos_token => self.bos.as_str(),
                eos_token => self.eos.as_str(),
            };
            let (instructions, blocks) = compile(&self.source)?;
            // No more than the fuel pays for can be written.
            let mut prompt = String::new();
            let mut out = machinery::make_string_output(&mut prompt);
            machinery::eval(&env, &instructions, context, &blocks, &mut out, AutoEscape::None)
                .map_err(|e| failure(&e, messages.len()))?;
            Ok(prompt)
        };
        on_stack(compile_stack(&self.source) + fuel as usize * STACK_PER_FUEL, job)
    }
}

fn environment() -> Environment<'static> {
    let mut env = Environment::new();
    env.set_recursion_limit(RECURSION);
    guard::install(&mut env);
    env.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(
            ErrorKind::InvalidOperation,
            format!("{REFUSED}{message}"),
        ))
    });
    env
}

/// The instructions of a template, and those of its blocks.
type Compiled<'a> = (Instructions<'a>, BTreeMap<&'a str, Instructions<'a>>);

/// Parses, meters and compiles.
fn compile(source: &str) -> Result<Compiled<'_>, TemplateError> {
    let bad = |e: Error| TemplateError::Syntax(shown(&format!("{e:#}")));
    let mut syntax = SyntaxConfig::builder();
    let syntax = syntax.trim_blocks(true).lstrip_blocks(true).build();
    let parsed = machinery::parse(source, "chat", syntax.map_err(bad)?).map_err(bad)?;
    let metered = meter::metered(&parsed).map_err(|what| TemplateError::Syntax(what.into()))?;
    let mut generator = CodeGenerator::new("chat", source);
    generator.compile_stmt(&metered);
    Ok(generator.finish())
}

fn compile_stack(source: &str) -> usize {
    (1 << 20) + source.len() * STACK_PER_BYTE
}

/// Runs `job` on a thread with `stack` bytes of stack: parsers, compilers and destructors recurse as deep as a file nests things.
fn on_stack<T: Send>(
    stack: usize,
    job: impl FnOnce() -> Result<T, TemplateError> + Send,
) -> Result<T, TemplateError> {
    std::thread::scope(|scope| {
        std::thread::Builder::new()
            .name("template".into())
            .stack_size(stack)
            .spawn_scoped(scope, job)
            .map_err(|e| TemplateError::Failed(format!("no thread to run it: {e}")))?
            .join()
            .unwrap_or_else(|_| Err(TemplateError::Failed("the interpreter gave up".into())))
    })
}

/// Marks the message of `raise_exception`.
const REFUSED: &str = "\u{0}refused\u{0}";

/// What an error of the interpreter means; the end of the fuel may lie behind other errors.
fn failure(error: &Error, messages: usize) -> TemplateError {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(e) = cause {
        let kind = e.downcast_ref::<Error>().map(Error::kind);
        if matches!(kind, Some(ErrorKind::OutOfFuel)) {
            return TemplateError::TooMuch { messages };
        }
        cause = e.source();
    }
    let text = error.detail().map_or_else(|| error.to_string(), str::to_string);
    match text.strip_prefix(REFUSED) {
        Some(message) => TemplateError::Refused(shown(message)),
        None => TemplateError::Failed(shown(&format!("{error:#}"))),
    }
}

fn folder_template(dir: &std::path::Path) -> Option<String> {
    if let Ok(source) = std::fs::read_to_string(dir.join("chat_template.jinja")) {
        return Some(source);
    }
    let config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(dir.join("tokenizer_config.json")).ok()?).ok()?;
    config["chat_template"].as_str().map(str::to_string)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHATML: &str = "{%- for m in messages %}\n    {{- '<|im_start|>' + m.role + '\\n' + m['content'] + '<|im_end|>\\n' }}\n{%- endfor %}\n{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

    fn render(source: &str) -> Result<String, TemplateError> {
        ChatTemplate::new(source, "<s>", "</s>")?.render(&[Message::new("user", "hi")], None, true)
    }

    #[test]
    fn chatml_renders_as_in_transformers() {
        assert_eq!(
            render(CHATML).unwrap(),
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        );
    }

    #[test]
    fn python_methods_and_json_are_there() {
        let tools = serde_json::json!([{"b": 1, "a": "<é>"}]);
        let t = ChatTemplate::new(
            "{{ ' x '.strip() }}{{ tools[0] | tojson }}{{ bos_token }}",
            "<s>",
            "",
        )
        .unwrap();
        assert_eq!(
            t.render(&[], Some(&tools), false).unwrap(),
            "x{\"b\": 1, \"a\": \"<é>\"}<s>"
        );
    }

    #[test]
    fn hostile_templates_are_errors() {
        assert!(matches!(render("{% if %}"), Err(TemplateError::Syntax(_))));
        assert!(matches!(render("{{ raise_exception('no') }}"), Err(TemplateError::Refused(m)) if m == "no"));
    }

    /// Each would take hours, gigabytes or the whole stack; all have to stop soon.
    #[test]
    fn templates_cannot_use_up_time_memory_or_stack() {
        let doubled = "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x | length }}";
        let again = "{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}";
        let shared = format!("{{% set ns = namespace(x=[1]) %}}{again}");
        let big = "{% set a = 'a' * 1000000 %}{% set b = 'b' * 1000000 %}{% set l = [1] * 50000 %}";
        let endless = "{% for i in range(100000) %}{% for j in range(100000) %}";
        let mut hostile = vec![
            doubled.to_string(),
            "{% for i in range(10000) %}{% for j in range(10000) %}{{ i }}{% endfor %}{% endfor %}".into(),
            "{% set x = 'aaaaaaaaaaaaaaaa' * 1000 %}{% for i in range(9999) %}{{ x }}{% endfor %}".into(),
            "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}".into(),
            "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}".into(),
            "{% include 'chat' %}".into(),
            "{{ 'x' * 10 ** 9 }}".into(),
            "{{ 'x' * 100000000 }}".into(),
            "{{ ([1] * 100000000) | length }}".into(),
            "{{ 'x' | list * 20 * 600000 }}".into(),
            "{{ '{:>9999999999}'.format(1) }}".into(),
            "{{ '{:>{}}'.format(1, 9999999999) }}".into(),
            "{{ '{:.9999999999f}'.format(1.5) }}".into(),
            "{{ '%9999999999d' | format(1) }}".into(),
            "{{ 1.5 | round(999999999) }}{{ 'x' * 10 ** 12 }}".into(),
            "{{ [1] | batch(9999999999, 0) | list }}".into(),
            "{{ [1] | slice(9999999999, 0) | list }}".into(),
            "{{ 'a\\nb' | indent(9999999999) }}".into(),
            format!("{endless}{{% endfor %}}{{% endfor %}}"),
            format!("{endless}{{% set x %}}{{{{ i }}}}{{% endset %}}{{% endfor %}}{{% endfor %}}"),
        ];
        for use_of in [
            "x",
            "x | string",
            "x | tojson",
            "x | tojson(indent=2)",
            "x | pprint",
            "x ~ ''",
            "x | join",
            "','.join(x)",
            "'{}'.format(x)",
            "x == [x]",
            "x in [[x, 1], x]",
            "x | sort",
            "x.count([x])",
            "{x: 1}",
            "{'a': 1}.get(x)",
            "{'a': 1}[x]",
            "[x, x] | unique | list",
            "x | map('string') | list",
            "debug()",
            "debug(x)",
            "x | upper",
            "'%s' | format(x)",
            "x | sum(start=[])",
            "x < [x]",
            "x | items",
            "[x] | dictsort",
            "'a'.startswith(x)",
            "'%s' % x",
            "x | e",
            "x | safe",
            "x | title",
            "x | first | trim",
            "x | replace('a', 'b')",
            "x | indent(2)",
            "x is startingwith('a')",
            "raise_exception(x)",
            "ns",
            "ns == namespace(x=x)",
            "x == y",
            "{x: 1} == {y: 1}",
        ] {
            hostile.push(format!(
                "{shared}{{% set x = ns.x %}}{{% set ns.x = [1] %}}{again}{{% set y = ns.x %}}{{% for i in range(200) %}}{{{{ {use_of} }}}}{{% endfor %}}"
            ));
        }
        for use_of in [
            "a.replace('a', b)",
            "a | replace('a', b)",
            "a | replace('', b)",
            "b.join(l)",
            "l | join(b)",
            "a.strip(b ~ 'a')",
            "a | trim(b ~ 'a')",
            "('{0}' * 9999).format(a)",
            "a.split('') | length",
            "a | list | length",
            "a.find(b)",
            "a == a ~ 'b'",
            "a.startswith([a ~ 'c'] * 50000)",
            "a | length",
            "a[9:]",
            "a | urlencode",
            "a[999999]",
        ] {
            hostile.push(format!(
                "{big}{{% for i in range(90000) %}}{{% set x = {use_of} %}}{{% endfor %}}"
            ));
        }
        // Lists in lists, as deep as the fuel reaches, and what recurses over them.
        for use_of in [
            "",
            "{{ ns.x }}",
            "{{ ns.x | tojson }}",
            "{{ ','.join(ns.x) }}",
            "{{ ns.x == [ns.x] }}",
            "{% set y = {ns.x: 1} %}",
            "{{ ns.x | string }}",
            "{{ [ns.x] | sort | length }}",
        ] {
            for times in [500, 2_000, 8_000, 16_000, 90_000] {
                let step = "{% set ns.x = [[[[ns.x]]]] %}";
                hostile.push(format!("{{% set ns = namespace(x=1) %}}{{% for i in range({times}) %}}{step}{{% endfor %}}{use_of}"));
                hostile.push(format!(
                    "{{% set ns = namespace(x=1) %}}{{% for i in range({times}) %}}{}{{% endfor %}}{use_of}",
                    step.replace("[[[[ns.x]]]]", "{1: ns.x}")
                ));
            }
        }
        for source in hostile {
            let start = std::time::Instant::now();
            if let Ok(text) = render(&source) {
                assert!(text.len() < 1 << 20, "{source}: {} bytes", text.len());
            }
            let seconds = start.elapsed().as_secs_f64();
            if std::env::var_os("SHOW").is_some() {
                eprintln!("{seconds:.2} {}", &source[source.len().saturating_sub(120)..]);
            }
            assert!(seconds < 20.0, "{source}: {seconds} s");
        }
        let e = render(doubled);
        assert!(matches!(e, Err(TemplateError::TooMuch { messages: 1 })), "{e:?}");
        assert!(matches!(
            render(&"a".repeat(MAX_SOURCE + 1)),
            Err(TemplateError::Syntax(_))
        ));
    }

    #[test]
    fn long_conversations_have_the_fuel_they_need() {
        let messages: Vec<Message> = (0..2_000)
            .map(|i| Message::new(if i % 2 == 0 { "user" } else { "assistant" }, "word ".repeat(200)))
            .collect();
        let prompt = ChatTemplate::new(CHATML, "", "")
            .unwrap()
            .render(&messages, None, true)
            .unwrap();
        assert_eq!(prompt.matches("<|im_end|>").count(), messages.len());
    }
}
