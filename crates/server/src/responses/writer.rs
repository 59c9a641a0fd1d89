//! An answer as the items of a response, and the events that tell how they grow.

use serde_json::{Value, json};

use super::Form;
use crate::state::App;
use crate::tools::{Call, Piece, Splitter};

/// Takes text in, gives items and events out.
pub(super) struct Writer<'a> {
    app: &'a App,
    splitter: Option<Splitter>,
    most_calls: usize,
    calls: usize,
    items: Vec<Value>,
    /// The message that grows: id, text, log-probabilities.
    open: Option<(String, String, Vec<Value>)>,
}

impl<'a> Writer<'a> {
    pub(super) fn new(app: &'a App, form: &Form) -> Self {
        Self {
            app,
            splitter: form.calls.then(|| Splitter::new(form.opened)),
            most_calls: form.most_calls,
            calls: 0,
            items: Vec::new(),
            open: None,
        }
    }

    /// The items so far.
    pub(super) fn output(&self) -> Vec<Value> {
        self.items.clone()
    }

    /// Takes the next piece of the answer in; with `end` the last one.
    pub(super) fn push(&mut self, text: &str, logprobs: Vec<Value>, end: bool) -> Vec<Value> {
        let mut pieces = match &mut self.splitter {
            Some(splitter) => splitter.push(text),
            None if text.is_empty() && logprobs.is_empty() => Vec::new(),
            None => vec![Piece::Text(text.to_string())],
        };
        if end {
            pieces.extend(self.splitter.as_mut().and_then(Splitter::finish));
        }
        let mut events = Vec::new();
        let mut logprobs = logprobs;
        for piece in pieces {
            if self.calls == self.most_calls {
                break;
            }
            match piece {
                Piece::Text(text) => self.text(&text, std::mem::take(&mut logprobs), &mut events),
                Piece::Call(call) => self.call(&call, &mut events),
            }
        }
        if end {
            // An answer without a word is still a message.
            if self.items.is_empty() {
                self.text("", Vec::new(), &mut events);
            }
            self.close(&mut events);
        }
        events
    }

    fn part(text: &str, logprobs: &[Value]) -> Value {
        json!({"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs})
    }

    fn message(id: &str, status: &str, content: Vec<Value>) -> Value {
        json!({"id": id, "type": "message", "role": "assistant", "status": status, "content": content})
    }

    fn text(&mut self, text: &str, logprobs: Vec<Value>, events: &mut Vec<Value>) {
        let index = self.items.len();
        let app = self.app;
        let (id, whole, all) = self.open.get_or_insert_with(|| {
            let id = app.id("msg");
            events.extend([
                json!({
                    "type": "response.output_item.added", "output_index": index,
                    "item": Self::message(&id, "in_progress", Vec::new()),
                }),
                json!({
                    "type": "response.content_part.added", "item_id": id, "output_index": index, "content_index": 0,
                    "part": Self::part("", &[]),
                }),
            ]);
            (id, String::new(), Vec::new())
        });
        if text.is_empty() && logprobs.is_empty() {
            return;
        }
        whole.push_str(text);
        events.push(json!({
            "type": "response.output_text.delta", "item_id": id, "output_index": index, "content_index": 0,
            "delta": text, "logprobs": logprobs,
        }));
        all.extend(logprobs);
    }

    /// Ends the message that grows.
    fn close(&mut self, events: &mut Vec<Value>) {
        let Some((id, text, logprobs)) = self.open.take() else {
            return;
        };
        let index = self.items.len();
        let part = Self::part(&text, &logprobs);
        let item = Self::message(&id, "completed", vec![part.clone()]);
        events.extend([
            json!({
                "type": "response.output_text.done", "item_id": id, "output_index": index, "content_index": 0,
                "text": text, "logprobs": logprobs,
            }),
            json!({
                "type": "response.content_part.done", "item_id": id, "output_index": index, "content_index": 0, "part": part,
            }),
            json!({"type": "response.output_item.done", "output_index": index, "item": item}),
        ]);
        self.items.push(item);
    }

    fn call(&mut self, call: &Call, events: &mut Vec<Value>) {
        self.close(events);
        self.calls += 1;
        let index = self.items.len();
        let (id, call_id) = (self.app.id("fc"), self.app.id("call"));
        let item = |status: &str, arguments: &str| {
            json!({
                "id": id, "type": "function_call", "status": status, "call_id": call_id, "name": call.name,
                "arguments": arguments,
            })
        };
        let done = item("completed", &call.arguments);
        events.extend([
            json!({"type": "response.output_item.added", "output_index": index, "item": item("in_progress", "")}),
            json!({
                "type": "response.function_call_arguments.delta", "item_id": id, "output_index": index,
                "delta": call.arguments,
            }),
            json!({
                "type": "response.function_call_arguments.done", "item_id": id, "output_index": index,
                "name": call.name, "arguments": call.arguments,
            }),
            json!({"type": "response.output_item.done", "output_index": index, "item": done}),
        ]);
        self.items.push(done);
    }
}
