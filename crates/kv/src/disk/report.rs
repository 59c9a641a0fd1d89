//! What a tier tells about itself.

use std::{collections::BTreeMap, fs::File, path::PathBuf, time::Duration};

use crate::key::{Fingerprint, Key, Namespace};

use super::{
    DiskError, DiskTier,
    format::Record,
    now,
    segment::{data_path, identity, read_payload, scan, short},
};

/// Figures of a tier. Counts are since it was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskStats {
    /// Blocks of this model that can be found.
    pub blocks: usize,
    /// Segment files, those of other models included.
    pub segments: usize,
    /// Bytes of all files.
    pub bytes: u64,
    /// Bytes of the files of other models.
    pub foreign_bytes: u64,
    /// Bytes that the files may take.
    pub capacity: u64,
    /// Blocks read.
    pub hits: u64,
    /// Blocks asked for and not there, or damaged.
    pub misses: u64,
    /// Blocks that were damaged.
    pub bad: u64,
    /// Segments deleted to make room.
    pub evicted: u64,
    /// Bytes stored.
    pub bytes_written: u64,
    /// Bytes of blocks read.
    pub bytes_read: u64,
    /// Whether blocks are still stored.
    pub writing: bool,
}

/// The blocks of one tenant of one model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// The model and layout, hashed. Empty where a damaged header does not say it.
    pub model: String,
    /// Whether it is the model that the tier was opened for.
    pub own: bool,
    /// The salt, hashed.
    pub salt: String,
    /// Blocks of 32 tokens.
    pub blocks: usize,
    /// Bytes of their records.
    pub bytes: u64,
    /// Age of the oldest block.
    pub oldest: Duration,
    /// Age of the newest block.
    pub newest: Duration,
}

/// A stretch of a file that holds no whole record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadRecord {
    /// The segment file.
    pub file: PathBuf,
    /// Where.
    pub offset: u64,
    /// How many bytes.
    pub bytes: u64,
    /// What is wrong.
    pub reason: &'static str,
}

/// What [`DiskTier::verify`] has found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Verified {
    /// Segments read.
    pub segments: usize,
    /// Whole records.
    pub records: usize,
    /// Bytes of their payloads.
    pub bytes: u64,
    /// Everything else.
    pub bad: Vec<BadRecord>,
}

impl DiskTier {
    /// Figures for reports.
    pub fn stats(&self) -> DiskStats {
        let counters = &self.counters;
        DiskStats {
            blocks: self.index.len(),
            segments: self.segments.len(),
            bytes: self.bytes(),
            foreign_bytes: self.segments.values().filter(|s| !s.own).map(|s| s.cost()).sum(),
            capacity: self.limits.capacity,
            hits: counters.hits,
            misses: counters.misses,
            bad: counters.bad,
            evicted: counters.evicted,
            bytes_written: counters.bytes_written,
            bytes_read: counters.bytes_read,
            writing: self.off.is_none(),
        }
    }

    /// Everything on disk by model and tenant, as the headers of the records say; blocks that only wait in memory are left out.
    pub fn ls(&self) -> impl Iterator<Item = Listed> {
        let now = now();
        let mut groups: BTreeMap<(Option<Fingerprint>, Namespace), Listed> = BTreeMap::new();
        for &number in self.segments.keys() {
            let Ok(file) = File::open(data_path(&self.dir, number)) else {
                continue;
            };
            let model = identity(&file, number);
            let note = |record: Record| {
                let age = Duration::from_secs(u64::from(now.saturating_sub(record.created)));
                let group = groups.entry((model, record.namespace)).or_insert_with(|| Listed {
                    model: model.map(|m| short(&m.0)).unwrap_or_default(),
                    own: model == Some(self.fingerprint),
                    salt: short(&record.namespace.0),
                    blocks: 0,
                    bytes: 0,
                    oldest: age,
                    newest: age,
                });
                group.blocks += 1;
                group.bytes += record.end() - record.offset;
                group.oldest = group.oldest.max(age);
                group.newest = group.newest.min(age);
            };
            // What cannot be read is not listed; `verify` tells about it.
            let _ = scan(&file, number, note);
        }
        groups.into_values()
    }

    /// Reads every byte of every file and forgets blocks that are not whole.
    ///
    /// # Errors
    /// When what waits in memory cannot be written first.
    pub fn verify(&mut self) -> Result<Verified, DiskError> {
        if self.off.is_none() {
            self.flush()?;
        }
        let mut report = Verified::default();
        let mut payload = Vec::new();
        let numbers: Vec<u64> = self.segments.keys().copied().collect();
        for number in numbers {
            let path = data_path(&self.dir, number);
            let mut bad = |offset, bytes, reason| {
                report.bad.push(BadRecord {
                    file: path.clone(),
                    offset,
                    bytes,
                    reason,
                });
            };
            let mut whole: Vec<(Key, u64)> = Vec::new();
            let scanned = File::open(&path).and_then(|file| {
                if identity(&file, number).is_none() {
                    bad(
                        0,
                        super::SEGMENT_HEADER as u64,
                        "the header of the segment is damaged",
                    );
                }
                let mut records = Vec::new();
                let gaps = scan(&file, number, |r| records.push(r))?;
                for gap in gaps {
                    bad(gap.start, gap.end - gap.start, "no record, or a torn one");
                }
                for record in records {
                    match read_payload(&file, &record, &mut payload) {
                        Ok(true) => whole.push((record.key, record.offset)),
                        Ok(false) => bad(record.offset, record.end() - record.offset, "wrong checksum"),
                        Err(_) => bad(record.offset, record.end() - record.offset, "cannot be read"),
                    }
                    report.bytes += u64::from(record.len);
                }
                Ok(())
            });
            if scanned.is_err() {
                bad(0, 0, "the file cannot be read");
            }
            report.segments += 1;
            report.records += whole.len();
            let whole: std::collections::HashSet<(Key, u64)> = whole.into_iter().collect();
            self.index
                .retain(|key, p| p.segment != number || whole.contains(&(*key, p.entry.offset)));
        }
        Ok(report)
    }
}
