//! Model files, tokenizers, chat templates, the model store and the decoder.
