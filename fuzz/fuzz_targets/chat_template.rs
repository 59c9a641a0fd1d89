//! Any template over any conversation: an error or a prompt, in little memory, and soon: the time is `-timeout`.
//!
//! The input is the template, then, each behind a zero byte, the messages; without any there is one.
#![no_main]

use antefix_models::template::{ChatTemplate, Message};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let mut parts = text.split('\0');
    let Ok(template) = ChatTemplate::new(parts.next().unwrap_or_default(), "<s>", "</s>") else { return };
    let roles = ["user", "assistant", "system", "tool"];
    let mut messages: Vec<Message> =
        parts.take(8).zip(roles.iter().cycle()).map(|(text, role)| Message::new(role, text)).collect();
    if messages.is_empty() {
        messages = vec![Message::new("system", "Be brief."), Message::new("user", " hi\n")];
    }
    let tools = serde_json::json!([{"name": "f", "parameters": {"x": [1, 2.5, null, "é"]}}]);
    match template.render(&messages, bytes.len().is_multiple_of(2).then_some(&tools), true) {
        Ok(prompt) => assert!(prompt.len() <= 64 << 20),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});
