//! What clients say about how long their prompts are kept, in OpenAI's and Anthropic's words.
//!
//! | said | kept |
//! |---|---|
//! | nothing | until the memory is needed, or as the server is told |
//! | `cache_control`, `ttl` `5m` (the default) or `1h` | as long after its last use, in memory only; evicted later than others |
//! | `prompt_cache_retention: "in_memory"` | 1 hour after its last use, in memory only |
//! | `prompt_cache_retention: "24h"` | 24 hours after its last use, on disk as well |
//! | `prompt_cache_key` | evicted later than others |

use std::time::Duration;

use antefix_engine::Keep;
use serde_json::Value;

use crate::error::ApiError;

/// `cache_control` of a block or a tool; nothing where it is null.
///
/// # Errors
/// When its type or its `ttl` is another than Anthropic's.
pub(crate) fn cache_control(value: &Value) -> Result<Option<Duration>, ApiError> {
    let wrong = |what: String| Err(ApiError::param("cache_control", what));
    if value.is_null() {
        return Ok(None);
    }
    if value.get("type").and_then(Value::as_str) != Some("ephemeral") {
        return wrong("`cache_control.type` must be `ephemeral`".into());
    }
    match value.get("ttl").unwrap_or(&Value::Null) {
        Value::Null => Ok(Some(Duration::from_mins(5))),
        Value::String(ttl) if ttl == "5m" => Ok(Some(Duration::from_mins(5))),
        Value::String(ttl) if ttl == "1h" => Ok(Some(Duration::from_hours(1))),
        other => wrong(format!("`cache_control.ttl` is {other}\nhint: \"5m\" or \"1h\"")),
    }
}

/// What a request with OpenAI's fields wishes.
///
/// # Errors
/// When there is no such retention.
pub(crate) fn openai(retention: Option<&str>, key: Option<&str>) -> Result<Keep, ApiError> {
    let marked = match key {
        Some(key) if !key.is_empty() => usize::MAX,
        _ => 0,
    };
    let keep = |ttl, ram_only| Keep {
        ttl,
        marked,
        ram_only,
    };
    match retention {
        None => Ok(keep(None, false)),
        Some("in_memory" | "in-memory") => Ok(keep(Some(Duration::from_hours(1)), true)),
        Some("24h") => Ok(keep(Some(Duration::from_hours(24)), false)),
        Some(other) => Err(ApiError::param(
            "prompt_cache_retention",
            format!("there is no retention `{other}`\nhint: in_memory or 24h"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn anthropics_marks_have_two_lives() {
        let minutes = |v: Value| cache_control(&v).ok().map(|ttl| ttl.map(|t| t.as_secs() / 60));
        assert_eq!(minutes(Value::Null), Some(None));
        assert_eq!(minutes(json!({"type": "ephemeral"})), Some(Some(5)));
        assert_eq!(minutes(json!({"type": "ephemeral", "ttl": "5m"})), Some(Some(5)));
        assert_eq!(minutes(json!({"type": "ephemeral", "ttl": "1h"})), Some(Some(60)));
        for bad in [
            json!({"type": "ephemeral", "ttl": "2h"}),
            json!({"type": "ephemeral", "ttl": 5}),
            json!({"ttl": "5m"}),
            json!("ephemeral"),
        ] {
            assert_eq!(minutes(bad.clone()), None, "{bad}");
        }
    }

    #[test]
    fn openais_retentions_are_memory_or_disk() {
        let hours = |name| openai(name, None).map(|k| (k.ttl.map(|t| t.as_secs() / 3600), k.ram_only));
        assert_eq!(hours(None).unwrap(), (None, false));
        assert_eq!(hours(Some("in_memory")).unwrap(), (Some(1), true));
        assert_eq!(hours(Some("24h")).unwrap(), (Some(24), false));
        assert!(hours(Some("forever")).is_err());
        assert_eq!(openai(None, Some("docs")).unwrap().marked, usize::MAX);
        assert_eq!(openai(None, Some("")).unwrap().marked, 0);
    }
}
