//! Conversations, one JSON object a line: rendered by a chat template, only what the assistant says is scored.

use antefix_models::template::{ChatTemplate, Message};
use antefix_models::tokenizer::Specials;
use serde::Deserialize;
use serde_json::Value;

use super::super::model::Tokens;
use crate::prefix_grouper::Marked;

/// A line of the file.
#[derive(Deserialize)]
pub(super) struct Conversation {
    messages: Vec<Message>,
    tools: Option<Value>,
}

/// Texts in turn not scored and scored, beginning with one that is not.
struct Pieces(Vec<String>);

impl Conversation {
    /// Sequences out of one conversation: one, unless the template writes earlier turns anew when later ones come (some leave out what the
    /// assistant thought); then each turn it has changed ends a sequence of its own.
    pub(super) fn sequences(&self, template: &ChatTemplate, tokens: &Tokens) -> Result<Vec<Marked>, String> {
        let (mut done, mut open) = (Vec::new(), Pieces(Vec::new()));
        let mut so_far = String::new();
        for (k, message) in self.messages.iter().enumerate() {
            if message.role != "assistant" {
                continue;
            }
            let render = |n: usize, generate: bool| {
                template
                    .render(&self.messages[..n], self.tools.as_ref(), generate)
                    .map_err(|e| e.to_string())
            };
            let (before, after) = (render(k, true)?, render(k + 1, false)?);
            let said = after.strip_prefix(before.as_str());
            let Some(said) = said.filter(|said| !said.is_empty()) else {
                return Err(format!(
                    "the template does not put message {} behind the prompt it makes for it",
                    k + 1
                ));
            };
            match before.strip_prefix(so_far.as_str()) {
                Some(between) => open.0.push(between.to_string()),
                None => {
                    done.push(std::mem::replace(&mut open, Pieces(vec![before.clone()])));
                }
            }
            open.0.push(said.to_string());
            so_far = after;
        }
        done.push(open);
        if so_far.is_empty() {
            return Err("nothing in it is said by the assistant".into());
        }
        Ok(done.iter().map(|pieces| pieces.tokens(tokens)).collect())
    }
}

impl Pieces {
    /// What comes behind the end of a turn - a line break, mostly - is not scored: the model is stopped before it.
    fn tokens(&self, tokens: &Tokens) -> Marked {
        let mut out = Marked {
            tokens: Vec::new(),
            scored: Vec::new(),
        };
        for (i, piece) in self.0.iter().enumerate() {
            let ids = match tokens {
                Tokens::Bytes => tokens.encode(piece),
                Tokens::Model(tokenizer) if i == 0 => tokenizer.encode_prompt(piece),
                Tokens::Model(tokenizer) => tokenizer.encode(piece, Specials::Parse),
            };
            let ends = |id: &u32| matches!(tokens, Tokens::Model(t) if t.is_end(*id));
            let said = ids.iter().rposition(ends).map_or(ids.len(), |at| at + 1);
            out.scored
                .extend((0..ids.len()).map(|at| i % 2 == 1 && at < said));
            out.tokens.extend(ids);
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Marks turns, and leaves thoughts of all but the last answer out.
    const TEMPLATE: &str = "{% for m in messages %}<{{ m.role }}>{% if loop.last or m.role != 'assistant' %}{{ m.content }}\
        {% else %}{{ m.content | replace('hm ', '') }}{% endif %}</>\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";

    fn read(line: &str) -> Result<Vec<(String, String)>, String> {
        let template = ChatTemplate::new(TEMPLATE, "", "").unwrap();
        let line: Conversation = serde_json::from_str(line).map_err(|e| e.to_string())?;
        let sequences = line.sequences(&template, &Tokens::Bytes)?;
        let text = |m: &Marked, scored: bool| -> String {
            let kept = m.tokens.iter().zip(&m.scored).filter(|(_, s)| **s == scored);
            kept.map(|(&t, _)| char::from(t as u8)).collect()
        };
        Ok(sequences
            .iter()
            .map(|m| (text(m, false), text(m, true)))
            .collect())
    }

    #[test]
    fn what_the_assistant_says_is_scored() {
        let found = read(
            r#"{"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}, {"role": "user", "content": "e"}]}"#,
        );
        let unscored = "<system>S</>\n<user>a</>\n<assistant><user>c</>\n<assistant>";
        assert_eq!(
            found.unwrap(),
            [(unscored.to_string(), "b</>\nd</>\n".to_string())]
        );
    }

    #[test]
    fn turns_that_a_template_changes_are_sequences_of_their_own() {
        let found = read(
            r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "hm b"},
                {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]}"#,
        );
        let want = [
            ("<user>a</>\n<assistant>", "hm b</>\n"),
            ("<user>a</>\n<assistant>b</>\n<user>c</>\n<assistant>", "d</>\n"),
        ];
        assert_eq!(found.unwrap(), want.map(|(a, b)| (a.to_string(), b.to_string())));
    }

    #[test]
    fn conversations_without_an_answer_are_refused() {
        for (line, says) in [
            (r#"{"messages": []}"#, "assistant"),
            (r#"{"messages": [{"role": "user", "content": "a"}]}"#, "assistant"),
            (r#"{"messages": [{"role": "user"}]}"#, "content"),
            (
                r#"{"messages": [{"role": "assistant", "content": null}]}"#,
                "null",
            ),
            (r#"{"message": 1}"#, "messages"),
        ] {
            let error = read(line).unwrap_err();
            assert!(error.contains(says), "{line}: {error}");
        }
    }
}
