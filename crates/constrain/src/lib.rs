//! Answers that follow a JSON schema, a regular expression, a Lark grammar or a list of choices.
//!
//! The grammars are `llguidance`'s: it is the engine behind several servers' structured output, its masks cost tens of microseconds a
//! token, and its limits on compilation and on every step are explicit. Ours: the vocabulary built once a model, white space bounded,
//! and the engine's [`Constraint`] on top.

use std::sync::Arc;

use antefix_engine::{BoxedConstraint, Constraint, ConstraintFailed};
use antefix_models::tokenizer::{Specials, Tokenizer};
use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::toktrie::{InferenceCapabilities, TokEnv, TokRxInfo, TokTrie, TokenizerEnv};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};

/// Bytes of a schema, an expression or a grammar at most.
const MAX_SOURCE: usize = 256 << 10;

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
}

impl Vocabulary {
    /// Sorts the tokens into a trie. Special tokens are never produced as plain text.
    ///
    /// # Errors
    /// When the tokenizer has no end token, or `llguidance` refuses it.
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
            ..ParserLimits::default()
        };
        Ok(Self { factory, size })
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
        let matcher = Matcher::new(self.factory.create_parser(top));
        match matcher.get_error() {
            Some(error) => Err(GrammarError::Invalid(first_line(&error))),
            None => Ok(BoxedConstraint(Box::new(Follow {
                matcher,
                size: self.size,
            }))),
        }
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
}

fn failed(error: impl std::fmt::Display) -> ConstraintFailed {
    ConstraintFailed(first_line(&error.to_string()))
}

impl Constraint for Follow {
    fn mask(&mut self, logits: &mut [f32]) -> Result<(), ConstraintFailed> {
        let allowed = self.matcher.compute_mask_or_eos().map_err(failed)?;
        for (id, logit) in logits.iter_mut().enumerate() {
            if id >= self.size || !allowed.is_allowed(id as u32) {
                *logit = f32::NEG_INFINITY;
            }
        }
        Ok(())
    }

    fn commit(&mut self, token: u32) -> Result<(), ConstraintFailed> {
        self.matcher.consume_token(token).map_err(failed)
    }

    fn is_done(&self) -> bool {
        self.matcher.is_stopped()
    }

    fn forced(&mut self) -> Vec<u32> {
        self.matcher.consume_ff_tokens()
    }

    fn fork(&self) -> Box<dyn Constraint> {
        Box::new(Self {
            matcher: self.matcher.deep_clone(),
            size: self.size,
        })
    }
}
