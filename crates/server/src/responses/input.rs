//! What `/v1/responses` is asked with, as templates want it.

use antefix_models::template::Message;
use serde::Deserialize;
use serde_json::{Value, json};
use utoipa::ToSchema;

use crate::error::ApiError;

/// A text, or items: messages, calls and their results.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(untagged)]
pub(crate) enum Input {
    Text(String),
    Items(Vec<Value>),
}

impl Input {
    pub(super) fn messages(&self) -> Result<Vec<Message>, ApiError> {
        let items = match self {
            Self::Text(text) => return Ok(vec![Message::new("user", text.as_str())]),
            Self::Items(items) => items,
        };
        let mut messages = Vec::new();
        for item in items {
            add(item, &mut messages)?;
        }
        match messages.is_empty() {
            true => Err(ApiError::param("input", "`input` is empty")),
            false => Ok(messages),
        }
    }
}

fn field<'a>(item: &'a Value, name: &str) -> Result<&'a str, ApiError> {
    let value = item.get(name).and_then(Value::as_str);
    value.ok_or_else(|| ApiError::param("input", format!("an item lacks the text `{name}`")))
}

/// Adds an item; calls in a row are one message.
fn add(item: &Value, messages: &mut Vec<Message>) -> Result<(), ApiError> {
    match item.get("type").and_then(Value::as_str).unwrap_or("message") {
        "message" => {
            let role = match field(item, "role")? {
                "developer" => "system",
                role @ ("system" | "user" | "assistant") => role,
                other => {
                    return Err(ApiError::param(
                        "input",
                        format!("there is no role `{other}`\nhint: system, developer, user or assistant"),
                    ));
                }
            };
            messages.push(Message::new(role, text_of(item.get("content"))?));
        }
        "function_call" => {
            let arguments = field(item, "arguments")?;
            // Templates want the object.
            let arguments = serde_json::from_str(arguments).unwrap_or_else(|_| json!(arguments));
            let call = json!({
                "id": field(item, "call_id")?,
                "type": "function",
                "function": {"name": field(item, "name")?, "arguments": arguments},
            });
            let last = messages
                .last_mut()
                .filter(|m| m.role == "assistant")
                .and_then(|m| m.extra.get_mut("tool_calls"))
                .and_then(Value::as_array_mut);
            match last {
                Some(calls) => calls.push(call),
                None => {
                    let mut message = Message::new("assistant", "");
                    message.extra.insert("tool_calls".into(), json!([call]));
                    messages.push(message);
                }
            }
        }
        "function_call_output" => {
            let mut message = Message::new("tool", text_of(item.get("output"))?);
            message
                .extra
                .insert("tool_call_id".into(), json!(field(item, "call_id")?));
            messages.push(message);
        }
        // What another model thought is nothing this one could read.
        "reasoning" => {}
        other => {
            return Err(ApiError::param(
                "input",
                format!("items of type `{other}` cannot be read by this model"),
            ));
        }
    }
    Ok(())
}

fn text_of(content: Option<&Value>) -> Result<String, ApiError> {
    let part = |part: &Value| match (part.get("type").and_then(Value::as_str), part.get("text")) {
        (Some("input_text" | "output_text" | "text"), Some(Value::String(text))) => Ok(text.clone()),
        (Some("refusal"), _) => Ok(String::new()),
        (kind, _) => Err(ApiError::param(
            "input",
            format!(
                "content of type `{}` cannot be read by this model\nhint: send text",
                kind.unwrap_or("?")
            ),
        )),
    };
    match content {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(Value::Array(parts)) => parts.iter().map(part).collect(),
        None | Some(Value::Null) => Ok(String::new()),
        Some(_) => Err(ApiError::param("input", "content is a text or a list of parts")),
    }
}

/// The items of an answer as messages of the next request's conversation.
pub(super) fn output_messages(output: &[Value]) -> Vec<Message> {
    let mut messages = Vec::new();
    for item in output {
        // They are ours and can be read.
        let _ = add(item, &mut messages);
    }
    messages
}

/// Function tools as chat completions and templates have them: one level deeper.
pub(super) fn functions(tools: &[Value]) -> Result<Option<Vec<Value>>, ApiError> {
    let deepen = |tool: &Value| match tool.get("type").and_then(Value::as_str) {
        Some("function") => {
            let mut function = tool.clone();
            if let Some(fields) = function.as_object_mut() {
                fields.remove("type");
            }
            Ok(json!({"type": "function", "function": function}))
        }
        kind => Err(ApiError::param(
            "tools",
            format!(
                "there is no tool of type `{}`\nhint: function",
                kind.unwrap_or("?")
            ),
        )),
    };
    let functions: Vec<Value> = tools.iter().map(deepen).collect::<Result<_, _>>()?;
    Ok((!functions.is_empty()).then_some(functions))
}
