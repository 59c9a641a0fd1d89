//! Dictionaries that requests use. Each is read and packed once, and again when its files change.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::SystemTime;

use antefix_attention::hooks::fingerprint;
use antefix_kernels::cpu::Cpu;
use antefix_kernels::matmul::{Matrix, Precision};
use antefix_kernels::quant::{Format, QuantError};
use antefix_kernels::team::Team;

use super::format::{SaeError, Stored};
use super::sae::Parts;

/// Dictionaries that are held although nobody uses them.
const HELD: usize = 4;

/// A dictionary with its encoder packed for the kernels.
#[derive(Debug)]
pub struct Loaded {
    /// The dictionary.
    pub stored: Stored,
    /// Differs between dictionaries with different weights.
    pub mark: u64,
    encoder: OnceLock<Arc<Matrix>>,
}

impl Loaded {
    /// Of a dictionary in memory.
    ///
    /// # Errors
    /// When it is too large for its format.
    pub fn new(stored: Stored) -> Result<Self, SaeError> {
        let mark = fingerprint(&stored.to_bytes()?);
        Ok(Self {
            stored,
            mark,
            encoder: OnceLock::new(),
        })
    }

    /// The dictionary at `path`, of memory if its files are as they were.
    ///
    /// # Errors
    /// As [`Stored::read`].
    pub fn read(path: &Path) -> Result<Arc<Self>, SaeError> {
        static KEPT: Mutex<Vec<(Stamp, Arc<Loaded>)>> = Mutex::new(Vec::new());
        let stamp = Stamp::of(path);
        let kept = || KEPT.lock().unwrap_or_else(PoisonError::into_inner);
        let known = |list: &[(Stamp, Arc<Self>)]| list.iter().position(|(s, _)| *s == stamp);
        let mut list = kept();
        if let Some(at) = known(&list) {
            list[..=at].rotate_right(1);
            return Ok(Arc::clone(&list[0].1));
        }
        // Others need not wait for the disk.
        drop(list);
        let loaded = Arc::new(Self::new(Stored::read(path)?)?);
        let mut list = kept();
        list.retain(|(s, _)| s.path != stamp.path);
        list.insert(0, (stamp, Arc::clone(&loaded)));
        list.truncate(HELD);
        Ok(loaded)
    }

    /// The encoder, `[F, d_in]`.
    ///
    /// # Errors
    /// When memory is short.
    pub(super) fn encoder(&self) -> Result<Arc<Matrix>, QuantError> {
        if let Some(matrix) = self.encoder.get() {
            return Ok(Arc::clone(matrix));
        }
        let p = self.stored.sae.parts();
        let all: Vec<u32> = (0..p.features as u32).collect();
        let matrix = Arc::new(columns(p, &all)?);
        Ok(Arc::clone(self.encoder.get_or_init(|| matrix)))
    }
}

/// The columns of these features, `[features, d_in]`.
///
/// # Errors
/// When memory is short.
pub(super) fn columns(p: &Parts, features: &[u32]) -> Result<Matrix, QuantError> {
    let mut bytes = Vec::with_capacity(features.len() * p.d_in * 4);
    for &j in features {
        for i in 0..p.d_in {
            bytes.extend(p.w_enc[i * p.features + j as usize].to_le_bytes());
        }
    }
    let team = Team::new(1);
    Matrix::pack(
        Cpu::best(),
        &team,
        Format::F32,
        &bytes,
        features.len(),
        p.d_in,
        Precision::F32,
    )
}

/// By what a change of files shows: sizes and times.
#[derive(Debug, PartialEq)]
struct Stamp {
    path: PathBuf,
    files: Vec<(PathBuf, u64, Option<SystemTime>)>,
}

impl Stamp {
    fn of(path: &Path) -> Self {
        let of = |file: PathBuf| {
            let about = std::fs::metadata(&file).ok()?;
            about
                .is_file()
                .then(|| (file, about.len(), about.modified().ok()))
        };
        let inside = std::fs::read_dir(path).into_iter().flatten().flatten();
        let mut files: Vec<_> = std::iter::once(path.to_owned())
            .chain(inside.map(|entry| entry.path()))
            .filter_map(of)
            .collect();
        files.sort();
        Self {
            path: path.to_owned(),
            files,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may")]

    use antefix_attention::method::Facts;

    use super::*;

    #[test]
    fn a_dictionary_is_read_once_and_again_when_its_file_changes() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a.safetensors");
        let bytes = super::super::made_up(&Facts::example());
        std::fs::write(&file, &bytes).unwrap();
        let first = Loaded::read(&file).unwrap();
        assert!(Arc::ptr_eq(&first, &Loaded::read(&file).unwrap()));
        assert!(Arc::ptr_eq(&first.encoder().unwrap(), &first.encoder().unwrap()));
        let later = SystemTime::now() + std::time::Duration::from_secs(5);
        let open = std::fs::File::options().write(true).open(&file).unwrap();
        open.set_modified(later).unwrap();
        let again = Loaded::read(&file).unwrap();
        assert!(!Arc::ptr_eq(&first, &again));
        assert_eq!(first.mark, again.mark, "it is the same dictionary");
        assert!(
            Loaded::read(folder.path()).is_err(),
            "a folder without a dictionary"
        );
    }
}
