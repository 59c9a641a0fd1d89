//! Whose keys and values a cache holds.

use antefix_kv::{Identity, Pool, SeqKv};
use antefix_models::decoder::{Extra, ForwardError, Input, Model, Scratch};
use antefix_models::error::LoadError;
use antefix_state::PAGE_ROWS;

/// Why a model has no identity.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IdentityError {
    /// Its files cannot be read any more.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// It cannot run.
    #[error(transparent)]
    Forward(#[from] ForwardError),
    /// A block does not fit into memory.
    #[error(transparent)]
    Kv(#[from] antefix_kv::KvError),
}

/// The identity of what `model` computes here: its weights, its specification with all rotary embeddings, the layout of its pages,
/// and the bits that a short prompt really gives. So another kind of CPU, another precision or a change of the arithmetic between
/// two versions makes another identity, without anybody having to remember to say so. Reads all weights and runs one short prompt.
///
/// # Errors
/// When the model's files are gone or it cannot run.
pub fn identity(model: &Model) -> Result<Identity, IdentityError> {
    let shape = model.kv_shape();
    let mut pool = Pool::new(shape, 2 * shape.block_bytes());
    let mut kv = SeqKv::new(shape);
    let vocab = model.spec().vocab as u32;
    let tokens: Vec<u32> = (0..PAGE_ROWS as u32 + 1)
        .map(|i| i.wrapping_mul(2_654_435_761) % vocab)
        .collect();
    pool.reserve(&mut kv, tokens.len())?;
    let input = Input {
        tokens: &tokens,
        kv: &kv,
        logits: 1,
        drawn: false,
        extra: Extra::default(),
    };
    let mut logits = Vec::new();
    model.forward(&mut pool, &[input], &mut Scratch::default(), &mut logits)?;
    kv.commit(tokens.len());
    let mut block = Vec::new();
    pool.export_block(&kv, 0, &mut block);
    pool.release(kv);
    let mut bits = blake3::Hasher::new();
    bits.update(&block);
    for x in &logits {
        bits.update(&x.to_le_bytes());
    }
    let layout = format!(
        "pages of {PAGE_ROWS} rows, {shape:?}; {:?}; kernels {}, precision {:?}; a probe gave {}",
        model.spec(),
        model.cpu().path().name(),
        model.precision(),
        bits.finalize().to_hex()
    );
    Ok(Identity {
        model: model.files().digest()?,
        layout,
    })
}
