//! The bytes of a model file: memory-mapped, or owned when they come from memory.
//!
//! The one place outside `antefix-kernels` with `unsafe` code.
#![allow(unsafe_code)] // memory-mapping a file is unsafe by nature: another process could change it under us

use std::{fs::File, ops::Deref, path::Path};

use memmap2::Mmap;

/// Read-only bytes of one file.
#[derive(Debug)]
pub(crate) enum Bytes {
    /// A mapping of a file; pages come and go with the page cache.
    Map(Mmap),
    /// Bytes that were in memory already.
    Owned(Vec<u8>),
}

impl Bytes {
    /// Maps a regular, non-empty file.
    ///
    /// # Errors
    /// Whatever the operating system says; an empty file or a folder is `InvalidInput`.
    pub(crate) fn open(path: &Path) -> std::io::Result<Self> {
        // Before opening: to open a pipe would wait for somebody to write.
        let meta = std::fs::metadata(path)?;
        if !meta.is_file() || meta.len() == 0 {
            let what = if meta.is_file() {
                "the file is empty"
            } else {
                "not a regular file"
            };
            return Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, what));
        }
        let file = File::open(path)?;
        // SAFETY: the mapping is private and read-only, and we never write through it. What remains is another process
        // that changes the file while we run: bytes are then wrong weights (or SIGBUS after a truncation), which the
        // documentation of `ModelFiles` rules out; every length used later was checked against this mapping's length.
        let map = unsafe { Mmap::map(&file)? };
        Ok(Self::Map(map))
    }

    /// Tells the system that the resident pages are not needed any more. Later reads fault them in again.
    pub(crate) fn drop_pages(&self) {
        #[cfg(unix)]
        if let Self::Map(map) = self {
            // SAFETY: the mapping is file-backed and never written through, so dropping its pages loses nothing: the next
            // read brings the same bytes back from the file. A refusal is harmless, this is a hint.
            let _ = unsafe { map.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) };
        }
    }
}

impl Deref for Bytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match self {
            Self::Map(map) => map,
            Self::Owned(bytes) => bytes,
        }
    }
}
