//! Chat templates: Jinja out of a model file, run with limits, because the file is not trusted.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value};
use minijinja::{Environment, Error, ErrorKind, context};
use serde::{Deserialize, Serialize};

use crate::files::ModelFiles;

/// Instructions that a template may run: real ones take a few hundred a message.
const FUEL: u64 = 5_000_000;

/// Nesting of calls and includes.
const RECURSION: usize = 100;

/// Bytes that a template may produce.
const MAX_OUTPUT: usize = 64 << 20;

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
    #[error("the model's chat template wrote more than {MAX_OUTPUT} bytes")]
    TooLong,
}

/// A compiled chat template.
pub struct ChatTemplate {
    env: Environment<'static>,
    bos: String,
    eos: String,
}

impl ChatTemplate {
    /// Compiles `source`; `bos` and `eos` are the texts of those tokens.
    ///
    /// # Errors
    /// On a syntax error.
    pub fn new(source: &str, bos: &str, eos: &str) -> Result<Self, TemplateError> {
        let mut env = Environment::new();
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build();
        env.set_syntax(syntax.map_err(|e| TemplateError::Syntax(e.to_string()))?);
        env.set_fuel(Some(FUEL));
        env.set_recursion_limit(RECURSION);
        env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        env.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(
                ErrorKind::InvalidOperation,
                format!("{REFUSED}{message}"),
            ))
        });
        env.add_filter("tojson", to_json);
        env.add_template_owned("chat", source.to_string())
            .map_err(|e| TemplateError::Syntax(format!("{e:#}")))?;
        Ok(Self {
            env,
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
        let template = self
            .env
            .get_template("chat")
            .map_err(|e| TemplateError::Syntax(e.to_string()))?;
        let ctx = context! {
            messages => Value::from(Serde(messages)),
            tools => Value::from(Serde(tools)),
            add_generation_prompt => generate,
            bos_token => self.bos.as_str(),
            eos_token => self.eos.as_str(),
        };
        let mut out = Limited(Vec::new());
        match template.render_captured_to(ctx, &mut out) {
            Ok(_) => String::from_utf8(out.0).map_err(|e| TemplateError::Failed(e.to_string())),
            Err(e) if e.kind() == ErrorKind::WriteFailure => Err(TemplateError::TooLong),
            Err(e) => {
                let text = e.detail().map_or_else(|| e.to_string(), str::to_string);
                Err(match text.strip_prefix(REFUSED) {
                    Some(message) => TemplateError::Refused(message.to_string()),
                    None => TemplateError::Failed(format!("{e:#}")),
                })
            }
        }
    }
}

/// Marks the message of `raise_exception`.
const REFUSED: &str = "\u{0}refused\u{0}";

/// A buffer with an end.
struct Limited(Vec<u8>);

impl std::io::Write for Limited {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_OUTPUT {
            return Err(std::io::Error::other("template output over its limit"));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// `json.dumps(value, ensure_ascii=False)`, as templates written for Python expect it: a space after commas and colons.
fn to_json(value: &Value, kwargs: Kwargs) -> Result<Value, Error> {
    struct Python;
    impl serde_json::ser::Formatter for Python {
        fn begin_array_value<W: ?Sized + std::io::Write>(
            &mut self,
            w: &mut W,
            first: bool,
        ) -> std::io::Result<()> {
            if first { Ok(()) } else { w.write_all(b", ") }
        }
        fn begin_object_key<W: ?Sized + std::io::Write>(
            &mut self,
            w: &mut W,
            first: bool,
        ) -> std::io::Result<()> {
            if first { Ok(()) } else { w.write_all(b", ") }
        }
        fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, w: &mut W) -> std::io::Result<()> {
            w.write_all(b": ")
        }
    }
    let bad = |e: serde_json::Error| Error::new(ErrorKind::BadSerialization, e.to_string());
    let indent: Option<usize> = kwargs.get("indent")?;
    let mut out = Vec::new();
    if let Some(indent) = indent {
        let spaces = vec![b' '; indent.min(16)];
        let formatter = serde_json::ser::PrettyFormatter::with_indent(&spaces);
        value
            .serialize(&mut serde_json::Serializer::with_formatter(&mut out, formatter))
            .map_err(bad)?;
    } else {
        value
            .serialize(&mut serde_json::Serializer::with_formatter(&mut out, Python))
            .map_err(bad)?;
    }
    Ok(Value::from_safe_string(
        String::from_utf8_lossy(&out).into_owned(),
    ))
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
        let e =
            render("{% for i in range(10000) %}{% for j in range(10000) %}{{ i }}{% endfor %}{% endfor %}");
        assert!(matches!(e, Err(TemplateError::Failed(_))), "{e:?}");
        let e = render("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}");
        assert!(matches!(e, Err(TemplateError::Failed(_))), "{e:?}");
        let e =
            render("{% set x = 'aaaaaaaaaaaaaaaa' * 1000 %}{% for i in range(9999) %}{{ x }}{% endfor %}");
        assert!(matches!(e, Err(TemplateError::TooLong)), "{e:?}");
    }
}
