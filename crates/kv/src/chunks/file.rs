//! A chunk on disk: one file, named by the chunk's key.
//!
//! All numbers little-endian, checksums xxh3-64:
//! ```text
//! magic 8, version 4, identity 32, key 32, first position 4, prefix tokens 4, tokens 4, prefix, tokens, checksum of all that 8
//! pages [layer][head][page], keys and then values as stored; checksum of the pages 8
//! ```
//! Keys are stored as they stand in memory, rotated for their position in the chunk's frame, so that a loaded chunk is bit for bit
//! the saved one. Whatever is wrong with a file makes it a miss.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use antefix_state::PAGE_ROWS;
use twox_hash::XxHash3_64;

use super::{ChunkKey, ChunkText};
use crate::key::Fingerprint;
use crate::pool::{Pool, SeqKv};
use crate::segment::{Kind, Positions, Segment};

const MAGIC: &[u8; 8] = b"AFXCHUNK";
const VERSION: u32 = 1;

/// Why a chunk was not written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChunkError {
    /// The system refused.
    #[error("{}: the chunk cannot be written", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Its rows are not those of a text: some are missing, weighted or scattered.
    #[error("only whole chunks are written to disk, not ones that a policy has changed")]
    NotWhole,
}

fn path(dir: &Path, key: ChunkKey) -> PathBuf {
    use std::fmt::Write as _;
    let name = key.0.iter().fold(String::new(), |mut name, b| {
        let _ = write!(name, "{b:02x}");
        name
    });
    dir.join(format!("{name}.chunk"))
}

fn header(fingerprint: Fingerprint, key: ChunkKey, start: u32, text: ChunkText<'_>) -> Vec<u8> {
    let mut out = Vec::new();
    out.extend(MAGIC);
    out.extend(VERSION.to_le_bytes());
    out.extend(fingerprint.0);
    out.extend(key.0);
    out.extend(start.to_le_bytes());
    for list in [text.prefix, text.tokens] {
        out.extend((list.len() as u32).to_le_bytes());
    }
    for token in text.prefix.iter().chain(text.tokens) {
        out.extend(token.to_le_bytes());
    }
    let sum = XxHash3_64::oneshot(&out);
    out.extend(sum.to_le_bytes());
    out
}

/// Writes a chunk under another name and renames it, so that a file is whole or not there.
pub(super) fn save(
    dir: &Path,
    fingerprint: Fingerprint,
    pool: &Pool,
    key: ChunkKey,
    prefix: &[u32],
    segment: &Segment,
) -> Result<(), ChunkError> {
    let shape = pool.shape();
    let tokens = segment.tokens();
    let start = prefix.len() as u32;
    let mut bytes = header(fingerprint, key, start, ChunkText { prefix, tokens });
    let from = bytes.len();
    for at in 0..shape.runs() {
        let run = segment.run(at / shape.kv_heads, at % shape.kv_heads);
        if run.len() != tokens.len()
            || !run.biased().is_empty()
            || *run.positions() != Positions::Affine(start)
        {
            return Err(ChunkError::NotWhole);
        }
        run.page_ids()
            .iter()
            .for_each(|&id| pool.export_page(id, &mut bytes));
    }
    let sum = XxHash3_64::oneshot(&bytes[from..]);
    bytes.extend(sum.to_le_bytes());
    let path = path(dir, key);
    let draft = path.with_extension(format!("{}.tmp", std::process::id()));
    let write = || {
        fs::create_dir_all(dir)?;
        let mut file = File::create(&draft)?;
        file.write_all(&bytes)?;
        file.sync_data()?;
        fs::rename(&draft, &path)
    };
    write().map_err(|source| {
        // Nothing more can be done about a draft that cannot be removed either.
        let _ = fs::remove_file(&draft);
        ChunkError::Io { path, source }
    })
}

/// Reads a chunk. Nothing if there is none, it is damaged or another one, or the pool has no room.
pub(super) fn load(
    dir: &Path,
    fingerprint: Fingerprint,
    pool: &mut Pool,
    key: ChunkKey,
    text: ChunkText<'_>,
) -> Option<Arc<Segment>> {
    let shape = pool.shape();
    let pages = shape.runs() * text.tokens.len().div_ceil(PAGE_ROWS);
    let mut file = File::open(path(dir, key)).ok()?;
    // All of the header is known beforehand: the chunk stands right behind its prefix.
    let start = u32::try_from(text.prefix.len()).ok()?;
    let want = header(fingerprint, key, start, text);
    let size = want.len() + pages * shape.page_bytes() + 8;
    if file.metadata().ok()?.len() != size as u64 {
        return None;
    }
    let mut bytes = Vec::with_capacity(size);
    file.read_to_end(&mut bytes).ok()?;
    let body = bytes.strip_prefix(&want[..])?;
    let (body, sum) = body.split_last_chunk()?;
    if XxHash3_64::oneshot(body) != u64::from_le_bytes(*sum) {
        return None;
    }
    let mut seq = SeqKv::new(shape);
    pool.reserve(&mut seq, text.tokens.len()).ok()?;
    let mut bodies = body.chunks_exact(shape.page_bytes());
    for at in 0..shape.runs() {
        for &id in seq.pages(at / shape.kv_heads, at % shape.kv_heads) {
            if let Some(page) = bodies.next() {
                pool.import_page(id, page);
            }
        }
    }
    seq.commit(text.tokens.len());
    Some(Segment::of_tail(
        pool,
        seq,
        start,
        text.tokens.to_vec(),
        Kind::Exact,
    ))
}
