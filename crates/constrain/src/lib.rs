//! Answers that follow a JSON schema, a regular expression, a Lark grammar or a list of choices.
//!
//! The grammars are `llguidance`'s: it is the engine behind several servers' structured output, its masks cost tens of microseconds a
//! token, and its limits on compilation and on every step are explicit. Ours: the vocabulary built once a model, white space bounded,
//! a limit on the time that following a grammar takes, and the engine's [`Constraint`] on top.

mod watch;

use std::sync::Arc;
use std::time::Duration;

use antefix_engine::{BoxedConstraint, Constraint, ConstraintFailed};
use antefix_models::tokenizer::{Specials, Tokenizer};
use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::toktrie::{InferenceCapabilities, TokEnv, TokRxInfo, TokTrie, TokenizerEnv};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};
use watch::Watch;

/// Bytes of a schema, an expression or a grammar at most.
const MAX_SOURCE: usize = 256 << 10;
/// States of a grammar's lexer at most, 1 to 2 KB each.
const MAX_LEXER_STATES: usize = 50_000;
/// Time that following a grammar may take at once: other requests wait for it. It runs out with what is used, and every token adds
/// [`TIME_A_TOKEN`]. Most take less than a hundredth of that.
const TIME_AT_ONCE: Duration = Duration::from_millis(250);
/// What a grammar may take for a token in the long run.
const TIME_A_TOKEN: Duration = Duration::from_millis(10);
/// What the first mask may take: nobody waits for it but its own request.
const TIME_TO_START: Duration = Duration::from_secs(2);

/// What an answer must follow.
#[derive(Debug, Clone, PartialEq)]
pub enum Grammar {
    /// Any JSON object.
    JsonObject,
    /// A JSON value that this schema accepts.
    JsonSchema(Value),
    /// A text that this expression matches as a whole (Rust's syntax, without look-around).
    Regex(String),
    /// A text that this grammar derives (Lark's syntax, as `llguidance` reads it).
    Lark(String),
    /// One of these texts.
    Choice(Vec<String>),
}

/// Why a grammar cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GrammarError {
    /// Too much text.
    #[error("the grammar has {bytes} bytes, at most {MAX_SOURCE} are read")]
    TooLong {
        /// Its size.
        bytes: usize,
    },
    /// No text could ever follow it.
    #[error("there is nothing to choose from")]
    NoChoice,
    /// Not understood, or over the limits.
    #[error("the grammar cannot be used: {0}")]
    Invalid(String),
    /// The tokenizer has no end token.
    #[error("the model's tokenizer has no end token, so no answer could end where the grammar does")]
    NoEnd,
    /// The system has no thread left for what ends grammars that take too long.
    #[error("grammars cannot be followed: {0}")]
    NoWatch(String),
}

struct Env {
    trie: TokTrie,
    tokenizer: Arc<Tokenizer>,
    canonical: bool,
}

impl TokenizerEnv for Env {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<u32> {
        self.tokenizer.encode_bytes(bytes, Specials::Plain)
    }

    fn tokenize_is_canonical(&self) -> bool {
        self.canonical
    }
}

/// A model's tokens, prepared for masks. Made once, shared by all constraints.
pub struct Vocabulary {
    factory: ParserFactory,
    size: usize,
    watch: Arc<Watch>,
}

impl Vocabulary {
    /// Sorts the tokens into a trie. Special tokens are never produced as plain text.
    ///
    /// # Errors
    /// When the tokenizer has no end token, `llguidance` refuses it, or there is no thread left.
    pub fn new(tokenizer: &Arc<Tokenizer>) -> Result<Self, GrammarError> {
        let size = tokenizer.vocab_size();
        let ends: Vec<u32> = (0..size as u32).filter(|&id| tokenizer.is_end(id)).collect();
        let &eos = tokenizer
            .eos()
            .iter()
            .chain(&ends)
            .next()
            .ok_or(GrammarError::NoEnd)?;
        let words: Vec<Vec<u8>> = (0..size as u32)
            .map(|id| {
                let bytes = tokenizer.token_bytes(id);
                match tokenizer.is_special(id) || tokenizer.is_end(id) {
                    true => [&[TokTrie::SPECIAL_TOKEN_MARKER], &bytes[..]].concat(),
                    // A plain token that starts with the marker's byte would read as a special one.
                    false if bytes.first() == Some(&TokTrie::SPECIAL_TOKEN_MARKER) => Vec::new(),
                    false => bytes,
                }
            })
            .collect();
        let mut trie = TokTrie::from(&TokRxInfo::new(size as u32, eos), &words);
        if !ends.is_empty() {
            trie = trie.with_eos_tokens(&ends);
        }
        let there_and_back = |text: &str| {
            let ids = tokenizer.encode_bytes(text.as_bytes(), Specials::Plain);
            tokenizer.decode_bytes(&ids) == text.as_bytes()
        };
        let env: TokEnv = Arc::new(Env {
            trie,
            tokenizer: Arc::clone(tokenizer),
            // A tokenizer that puts a space before every text cannot say how a text goes on.
            canonical: there_and_back("a") && there_and_back("{\"a\": 1"),
        });
        let caps = InferenceCapabilities {
            ff_tokens: true,
            ..InferenceCapabilities::default()
        };
        let slices = llguidance::earley::SlicedBiasComputer::general_slices();
        let mut factory =
            ParserFactory::new(&env, caps, &slices).map_err(|e| GrammarError::Invalid(e.to_string()))?;
        factory.quiet();
        *factory.limits_mut() = ParserLimits {
            verbose_errors: false,
            max_lexer_states: MAX_LEXER_STATES,
            ..ParserLimits::default()
        };
        let watch = Watch::new().map_err(|e| GrammarError::NoWatch(e.to_string()))?;
        Ok(Self {
            factory,
            size,
            watch: Arc::new(watch),
        })
    }

    /// A constraint at its start.
    ///
    /// # Errors
    /// When the grammar is not understood, asks for something that is not supported, or is over the limits.
    pub fn constrain(&self, grammar: &Grammar) -> Result<BoxedConstraint, GrammarError> {
        let bytes = match grammar {
            Grammar::JsonObject => 0,
            Grammar::JsonSchema(schema) => schema.to_string().len(),
            Grammar::Regex(text) | Grammar::Lark(text) => text.len(),
            Grammar::Choice(texts) => texts.iter().map(String::len).sum(),
        };
        if bytes > MAX_SOURCE {
            return Err(GrammarError::TooLong { bytes });
        }
        let top = match grammar {
            Grammar::JsonObject => TopLevelGrammar::from_json_schema(bounded(&json!({"type": "object"}))?),
            Grammar::JsonSchema(schema) => TopLevelGrammar::from_json_schema(bounded(schema)?),
            Grammar::Regex(text) => TopLevelGrammar::from_regex(text),
            Grammar::Lark(text) => TopLevelGrammar::from_lark(text.clone()),
            Grammar::Choice(texts) if texts.is_empty() => return Err(GrammarError::NoChoice),
            Grammar::Choice(texts) => {
                // JSON's quoting is Lark's.
                let quoted: Vec<String> = texts.iter().map(|t| json!(t).to_string()).collect();
                TopLevelGrammar::from_lark(format!("start: {}", quoted.join(" | ")))
            }
        };
        let matcher = Matcher::new(self.factory.create_parser(top)).into_cancellable();
        if let Some(error) = matcher.get_error() {
            return Err(GrammarError::Invalid(first_line(&error)));
        }
        let mut follow = Follow {
            matcher,
            size: self.size,
            watch: Arc::clone(&self.watch),
            left: TIME_TO_START,
        };
        // The first mask takes longest, and is remembered.
        follow
            .mask(&mut [])
            .map_err(|failed| GrammarError::Invalid(failed.0))?;
        follow.left = TIME_AT_ONCE;
        Ok(BoxedConstraint(Box::new(follow)))
    }
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().to_string()
}

/// The schema with our separators: one space after `:` and `,` and no other white space, as models write it and so that none can
/// run away.
fn bounded(schema: &Value) -> Result<Value, GrammarError> {
    let options = json!({"whitespace_flexible": false, "item_separator": ", ", "key_separator": ": "});
    match schema {
        Value::Object(fields) => {
            let mut fields = fields.clone();
            fields.insert("x-guidance".into(), options);
            Ok(Value::Object(fields))
        }
        Value::Bool(true) => Ok(json!({"x-guidance": options})),
        Value::Bool(false) => Err(GrammarError::NoChoice),
        _ => Err(GrammarError::Invalid("a schema is an object or a boolean".into())),
    }
}

struct Follow {
    matcher: Matcher,
    size: usize,
    watch: Arc<Watch>,
    /// Time that it may still take at once.
    left: Duration,
}

impl Follow {
    /// Does a part of the work of following the grammar, as long as there is time for it.
    fn work<T>(
        &mut self,
        part: impl FnOnce(&mut Matcher) -> Result<T, ConstraintFailed>,
    ) -> Result<T, ConstraintFailed> {
        let handle = self.matcher.cancellation_handle().unwrap_or_default();
        let (done, took) = self.watch.run(handle, self.left, || part(&mut self.matcher));
        self.left = self.left.saturating_sub(took);
        match self.matcher.is_cancelled() {
            true => Err(ConstraintFailed(format!(
                "following the grammar takes too long: more than {} ms a token",
                TIME_A_TOKEN.as_millis()
            ))),
            false => done,
        }
    }
}

fn failed(error: impl std::fmt::Display) -> ConstraintFailed {
    ConstraintFailed(first_line(&error.to_string()))
}

impl Constraint for Follow {
    fn mask(&mut self, logits: &mut [f32]) -> Result<(), ConstraintFailed> {
        self.left = self.left.max(TIME_AT_ONCE.min(self.left + TIME_A_TOKEN));
        let allowed = self.work(|m| m.compute_mask_or_eos().map_err(failed))?;
        for (id, logit) in logits.iter_mut().enumerate() {
            if id >= self.size || !allowed.is_allowed(id as u32) {
                *logit = f32::NEG_INFINITY;
            }
        }
        Ok(())
    }

    fn commit(&mut self, token: u32) -> Result<(), ConstraintFailed> {
        self.work(|m| m.consume_token(token).map_err(failed))
    }

    fn is_done(&self) -> bool {
        self.matcher.is_stopped() && !self.matcher.is_error()
    }

    fn forced(&mut self) -> Vec<u32> {
        // What goes wrong here, the next mask says.
        self.work(|m| Ok(m.consume_ff_tokens())).unwrap_or_default()
    }

    fn fork(&self) -> Box<dyn Constraint> {
        Box::new(Self {
            matcher: self.matcher.deep_clone(),
            size: self.size,
            watch: Arc::clone(&self.watch),
            left: self.left,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use antefix_models::gguf::Gguf;
    use antefix_models::spec::Arch;
    use antefix_models::testing::tiny_gguf;

    #[test]
    fn what_takes_too_long_fails_and_is_not_done() {
        let tokenizer = Tokenizer::from_gguf(&Gguf::parse(tiny_gguf(Arch::Llama, 11)).unwrap()).unwrap();
        let vocabulary = Vocabulary::new(&Arc::new(tokenizer)).unwrap();
        let matcher = |text: &str| {
            let parser = vocabulary
                .factory
                .create_parser(TopLevelGrammar::from_regex(text));
            Matcher::new(parser).into_cancellable()
        };
        let mut follow = Follow {
            matcher: matcher("[a-z]+"),
            size: vocabulary.size,
            watch: Arc::clone(&vocabulary.watch),
            left: TIME_AT_ONCE,
        };
        let mut logits = vec![0.0; vocabulary.size];
        follow.mask(&mut logits).unwrap();
        let whole = follow.left;
        let slept = follow.work(|_| {
            std::thread::sleep(Duration::from_millis(30));
            Ok(())
        });
        slept.unwrap();
        assert!(
            follow.left + Duration::from_millis(30) <= whole,
            "time is used up"
        );
        // As a mask of an ambiguous grammar does, which looks whether it may go on.
        let failed = follow.work(|m| {
            while !m.is_cancelled() {
                std::thread::sleep(Duration::from_millis(1));
            }
            Ok(())
        });
        assert!(failed.unwrap_err().0.contains("too long"));
        assert!(follow.forced().is_empty() && !follow.is_done());
        assert!(follow.mask(&mut logits).is_err() && follow.fork().mask(&mut logits).is_err());
        // A failure of another kind is no end, either.
        follow.matcher = matcher("ab");
        assert!(follow.commit(0).is_err() && !follow.is_done());
    }

    #[test]
    fn an_ambiguous_grammar_ends_in_time() {
        let tokenizer = Tokenizer::from_gguf(&Gguf::parse(tiny_gguf(Arch::Llama, 11)).unwrap()).unwrap();
        let vocabulary = Vocabulary::new(&Arc::new(tokenizer)).unwrap();
        // Without a bound this takes minutes.
        let ways: Vec<String> = (2..40).map(|n| vec!["s"; n].join(" ")).collect();
        let lark = format!("start: s\ns: {} | /[a-z]/ | \" \"", ways.join(" | "));
        let begun = std::time::Instant::now();
        let mut constraint = vocabulary.constrain(&Grammar::Lark(lark)).unwrap().0;
        let mut logits = vec![0.0; vocabulary.size];
        let mut tokens = 0u32;
        let failed = loop {
            logits.fill(0.0);
            if let Err(failed) = constraint.mask(&mut logits) {
                break failed;
            }
            let end = vocabulary.size - 1;
            let token = (0..end).rev().find(|&id| logits[id] == 0.0).unwrap_or(end);
            if let Err(failed) = constraint.commit(token as u32) {
                break failed;
            }
            tokens += 1;
        };
        let may = TIME_TO_START + TIME_AT_ONCE + TIME_A_TOKEN * tokens;
        assert!(
            begun.elapsed() < may * 4,
            "{tokens} tokens, {:?}: {failed}",
            begun.elapsed()
        );
        assert!(!constraint.is_done());
    }
}
