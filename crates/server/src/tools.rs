//! Tool calls in a model's answer: `<tool_call>{"name": .., "arguments": ..}</tool_call>`, as Qwen, SmolLM2 and Hermes write them.

use serde_json::{Value, json};

const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";

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
