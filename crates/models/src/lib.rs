//! Model files, tokenizers, chat templates, the model store and the decoder.

pub mod captures;
pub mod decoder;
pub mod documents;
pub mod error;
pub mod files;
pub mod gguf;
mod map;
mod role;
pub mod safetensors;
pub mod spec;
pub mod store;
pub mod template;
pub mod testing;
pub mod tokenizer;
