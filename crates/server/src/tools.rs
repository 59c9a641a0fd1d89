//! Tool calls in a model's answer: `<tool_call>{"name": .., "arguments": ..}</tool_call>`, as Qwen, SmolLM2 and Hermes write them.

use antefix_constrain::Grammar;
use serde_json::{Value, json};

use crate::error::ApiError;

const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";

/// Ends the prompt of an answer that has to be a call.
pub(crate) const OPENING: &str = "<tool_call>\n";

/// Which calls an answer may or must make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ToolChoice {
    Auto,
    None,
    Required,
    Named(String),
}

impl ToolChoice {
    /// OpenAI's `tool_choice`.
    pub(crate) fn read(value: Option<&Value>) -> Result<Self, ApiError> {
        let name = match value {
            None | Some(Value::Null) => return Ok(Self::Auto),
            Some(Value::String(s)) => match s.as_str() {
                "auto" => return Ok(Self::Auto),
                "none" => return Ok(Self::None),
                "required" => return Ok(Self::Required),
                _ => None,
            },
            Some(value) => value.pointer("/function/name").or_else(|| value.get("name")),
        };
        name.and_then(Value::as_str)
            .map(|name| Self::Named(name.to_string()))
            .ok_or_else(|| ApiError::param("tool_choice", "it is auto, none, required or names a function"))
    }

    /// Anthropic's.
    pub(crate) fn read_anthropic(value: Option<&Value>) -> Result<Self, ApiError> {
        let field = |name: &str| value.and_then(|v| v.get(name)).and_then(Value::as_str);
        match (value, field("type"), field("name")) {
            (None | Some(Value::Null), ..) | (_, Some("auto"), _) => Ok(Self::Auto),
            (_, Some("none"), _) => Ok(Self::None),
            (_, Some("any"), _) => Ok(Self::Required),
            (_, Some("tool"), Some(name)) => Ok(Self::Named(name.to_string())),
            _ => Err(ApiError::param(
                "tool_choice",
                "its type is auto, any, tool or none",
            )),
        }
    }

    /// What a call that must be made follows: JSON with the name of a tool and arguments that its schema accepts.
    pub(crate) fn grammar(&self, tools: Option<&[Value]>) -> Result<Option<Grammar>, ApiError> {
        let wanted = match self {
            Self::Auto | Self::None => return Ok(None),
            Self::Required => None,
            Self::Named(name) => Some(name.as_str()),
        };
        let calls: Vec<Value> = tools
            .unwrap_or_default()
            .iter()
            .filter_map(|tool| {
                let name = tool.pointer("/function/name")?.as_str()?;
                if wanted.is_some_and(|w| w != name) {
                    return None;
                }
                let any = json!({"type": "object"});
                let arguments = tool
                    .pointer("/function/parameters")
                    .filter(|p| p.is_object())
                    .cloned();
                Some(json!({
                    "type": "object",
                    "properties": {"name": {"const": name}, "arguments": arguments.unwrap_or(any)},
                    "required": ["name", "arguments"],
                    "additionalProperties": false,
                }))
            })
            .collect();
        if calls.is_empty() {
            return Err(ApiError::param(
                "tool_choice",
                "it forces a call of a tool that is not in `tools`",
            ));
        }
        let mut schema = match calls.len() {
            1 => calls[0].clone(),
            _ => json!({"anyOf": calls}),
        };
        // References start at the root: definitions move there.
        for name in ["$defs", "definitions"] {
            let mut all = serde_json::Map::new();
            let parameters = |call: &Value| {
                call.pointer("/properties/arguments")
                    .and_then(|p| p.get(name))
                    .cloned()
            };
            for (key, definition) in calls
                .iter()
                .filter_map(parameters)
                .filter_map(|d| match d {
                    Value::Object(map) => Some(map),
                    _ => None,
                })
                .flatten()
            {
                if all.get(&key).is_some_and(|other| *other != definition) {
                    return Err(ApiError::param(
                        "tools",
                        format!("two tools define `{key}` differently"),
                    ));
                }
                all.insert(key, definition);
            }
            if !all.is_empty() {
                schema[name] = Value::Object(all);
            }
        }
        Ok(Some(Grammar::JsonSchema(schema)))
    }
}

/// A call that the model made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Call {
    pub(crate) name: String,
    /// JSON text.
    pub(crate) arguments: String,
}

impl Call {
    /// A call out of the JSON between the marks.
    fn parse(text: &str) -> Option<Self> {
        let value: Value = serde_json::from_str(text.trim()).ok()?;
        let arguments = value.get("arguments").or_else(|| value.get("parameters"));
        Some(Self {
            name: value.get("name")?.as_str()?.to_string(),
            arguments: match arguments {
                Some(Value::String(text)) => text.clone(),
                Some(value) => value.to_string(),
                None => "{}".to_string(),
            },
        })
    }

    pub(crate) fn openai(&self, id: &str) -> Value {
        json!({"id": id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}})
    }
}

/// A piece of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Piece {
    Text(String),
    Call(Call),
}

/// Splits streamed text into text and calls; what might become a mark is held back.
#[derive(Debug, Default)]
pub(crate) struct Splitter {
    held: String,
    inside: bool,
}

impl Splitter {
    /// `opened`: the prompt has already opened a call.
    pub(crate) fn new(opened: bool) -> Self {
        Self {
            held: String::new(),
            inside: opened,
        }
    }

    pub(crate) fn push(&mut self, text: &str) -> Vec<Piece> {
        self.held.push_str(text);
        let mut pieces = Vec::new();
        loop {
            let mark = if self.inside { CLOSE } else { OPEN };
            let Some(at) = self.held.find(mark) else { break };
            let before: String = self.held.drain(..at + mark.len()).collect();
            let before = &before[..at];
            if self.inside {
                pieces.push(match Call::parse(before) {
                    Some(call) => Piece::Call(call),
                    None => Piece::Text(format!("{OPEN}{before}{CLOSE}")),
                });
            } else if !before.trim().is_empty() {
                pieces.push(Piece::Text(before.to_string()));
            }
            self.inside = !self.inside;
        }
        if !self.inside {
            let keep = (1..OPEN.len().min(self.held.len() + 1))
                .rev()
                .find(|&n| self.held.ends_with(&OPEN[..n]))
                .unwrap_or(0);
            let rest = self.held.split_off(self.held.len() - keep);
            let text = std::mem::replace(&mut self.held, rest);
            // White space between calls is no text.
            if !text.is_empty() {
                pieces.push(Piece::Text(text));
            }
        }
        pieces
    }

    /// The end of the answer: an unclosed call counts if it is whole.
    pub(crate) fn finish(&mut self) -> Option<Piece> {
        let held = std::mem::take(&mut self.held);
        if !self.inside {
            return (!held.is_empty()).then_some(Piece::Text(held));
        }
        Some(match Call::parse(&held) {
            Some(call) => Piece::Call(call),
            None => Piece::Text(format!("{OPEN}{held}")),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(text: &str, step: usize) -> (String, Vec<Call>) {
        let mut s = Splitter::default();
        let bytes: Vec<char> = text.chars().collect();
        let (mut out, mut calls) = (String::new(), Vec::new());
        let mut take = |pieces: Vec<Piece>| {
            for p in pieces {
                match p {
                    Piece::Text(t) => out.push_str(&t),
                    Piece::Call(c) => calls.push(c),
                }
            }
        };
        for chunk in bytes.chunks(step) {
            take(s.push(&chunk.iter().collect::<String>()));
        }
        take(s.finish().into_iter().collect());
        (out, calls)
    }

    #[test]
    fn calls_are_found_however_the_text_is_cut() {
        let text = "Let me look.<tool_call>\n{\"name\": \"f\", \"arguments\": {\"b\": 1, \"a\": [2]}}\n</tool_call>\n<tool_call>{\"name\": \"g\"}</tool_call>";
        for step in 1..text.len() {
            let (out, calls) = split(text, step);
            assert_eq!(out.trim(), "Let me look.", "{step}");
            assert_eq!(
                calls,
                [
                    Call {
                        name: "f".into(),
                        arguments: "{\"b\":1,\"a\":[2]}".into()
                    },
                    Call {
                        name: "g".into(),
                        arguments: "{}".into()
                    }
                ]
            );
        }
    }

    #[test]
    fn what_is_no_call_stays_text() {
        assert_eq!(split("a < b <tool", 3).0, "a < b <tool");
        assert_eq!(
            split("<tool_call>oops</tool_call>", 4).0,
            "<tool_call>oops</tool_call>"
        );
        assert_eq!(split("<tool_call>{\"name\":", 4).0, "<tool_call>{\"name\":");
    }
}
