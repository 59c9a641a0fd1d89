//! The disk tier: blocks of keys and values that survive a restart.
//!
//! A folder of append-only segment files (their bytes: `format.rs`). A block is one record: the bytes of its pages, and before
//! them its 32 token ids, the key of the block before it, and checksums. Keys are chained hashes over identity, salt and all
//! tokens so far; they only find a record. A hit needs that the record's tokens and parent are the wanted ones and that both
//! checksums hold, so whatever happens to the files costs hits and never gives wrong ones.
//!
//! *Durable:* what [`DiskTier::put`] took is on the disk when a later [`DiskTier::flush`] returns `Ok`; before that a crash may
//! lose it. *Bounded:* files stay below [`Limits::capacity`]; whole segments go, least recently used first, those of other
//! models as well. *Never in the way:* reading has no errors, only misses; the first failed write switches writing off, and
//! [`DiskTier::writing`] says why. *One writer:* who opens a folder that somebody writes gets a tier that only reads.

mod directory;
mod format;
mod report;
mod segment;
mod writer;

use std::{
    collections::BTreeMap,
    fs::{self, File, TryLockError},
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use antefix_state::PAGE_ROWS;

pub use directory::Directory;
pub use report::{BadRecord, DiskStats, Listed, Verified};

use crate::key::{BlockTokens, Fingerprint, Identity, Key};

use format::{
    Entry, INDEX_BASE, INDEX_ENTRY, MAX_PAYLOAD, RECORD_HEADER, Record, SEGMENT_HEADER, record_bytes,
};
use segment::{Segment, data_path, index_path};
use writer::Writer;

/// Why the disk tier cannot do something. Reading has no errors.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum DiskError {
    /// The folder is none, or may not be read.
    #[error("{}: cannot be used as a cache folder", .dir.display())]
    Folder {
        /// The folder.
        dir: PathBuf,
        /// What the system said.
        #[source]
        source: Arc<io::Error>,
    },
    /// Another process writes; this one may read.
    #[error("{}: another process writes this cache folder\nhint: give each server a folder of its own", .dir.display())]
    Locked {
        /// The folder.
        dir: PathBuf,
    },
    /// It was opened to be looked at.
    #[error("{}: opened for reading only", .dir.display())]
    Inspected {
        /// The folder.
        dir: PathBuf,
    },
    /// A write failed, and no more are tried: the disk is full, the folder is read-only or gone.
    #[error("{}: nothing is written to the cache any more: {source}\nhint: make room or mend the folder, then clear the cache or restart", .dir.display())]
    Off {
        /// The folder.
        dir: PathBuf,
        /// What the system said first.
        #[source]
        source: Arc<io::Error>,
    },
    /// The block alone is more than the tier may hold. Nothing else is wrong.
    #[error("a block of {bytes} bytes does not fit into a disk cache of {capacity}")]
    Oversize {
        /// Bytes of the block on disk.
        bytes: u64,
        /// Bytes that the tier may take.
        capacity: u64,
    },
}

/// What a tier may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of all files.
    pub capacity: u64,
    /// Bytes of a segment, the unit of eviction; never more than a quarter of the capacity is used.
    pub segment: u64,
    /// Age at which a block is forgotten.
    pub ttl: Option<Duration>,
}

impl Limits {
    /// `capacity` bytes in segments of 64 MiB, kept until they are evicted.
    pub fn new(capacity: u64) -> Self {
        Self {
            capacity,
            segment: 64 << 20,
            ttl: None,
        }
    }
}

/// Modification times of segments are renewed no more often than this.
const TOUCH_EVERY: Duration = Duration::from_mins(1);

#[derive(Debug, Clone, Copy)]
struct Place {
    segment: u64,
    entry: Entry,
}

/// Counts since the tier was opened.
#[derive(Debug, Default)]
struct Counters {
    hits: u64,
    misses: u64,
    bad: u64,
    evicted: u64,
    bytes_written: u64,
    bytes_read: u64,
}

/// Blocks on disk.
///
/// Memory: about 150 bytes a block that is found here, and up to 4 MiB of blocks that wait to be written.
#[derive(Debug)]
pub struct DiskTier {
    dir: PathBuf,
    fingerprint: Fingerprint,
    limits: Limits,
    index: Directory,
    segments: BTreeMap<u64, Segment>,
    active: Option<Writer>,
    next_number: u64,
    /// Why nothing is written, if so.
    off: Option<DiskError>,
    /// Held as long as the tier lives; the system frees it when the process dies.
    lock: Option<File>,
    clock: u64,
    counters: Counters,
}

impl DiskTier {
    /// Opens or makes a folder of blocks. Only headers are read, and per segment only one file if it was closed in order.
    ///
    /// # Errors
    /// When `dir` cannot be listed or made. A folder that can only be read, or is being written by another process, opens; then
    /// [`DiskTier::writing`] has the reason.
    pub fn open(dir: &Path, identity: &Identity, limits: Limits) -> Result<DiskTier, DiskError> {
        let folder = |source| DiskError::Folder {
            dir: dir.to_owned(),
            source: Arc::new(source),
        };
        make_folder(dir).map_err(folder)?;
        let (lock, off) = match lock(dir) {
            Ok(lock) => (Some(lock), None),
            Err(error) => (None, Some(error)),
        };
        Self::scan(dir, identity.fingerprint(), limits, lock, off).map_err(folder)
    }

    /// Opens a folder to look at what is there, of whatever model; changes nothing, so a server may be using it.
    ///
    /// # Errors
    /// When `dir` cannot be listed.
    pub fn inspect(dir: &Path) -> Result<DiskTier, DiskError> {
        let off = DiskError::Inspected { dir: dir.to_owned() };
        let everything = Limits::new(u64::MAX);
        Self::scan(dir, Fingerprint::default(), everything, None, Some(off)).map_err(|source| {
            DiskError::Folder {
                dir: dir.to_owned(),
                source: Arc::new(source),
            }
        })
    }

    /// Deletes everything in a folder, of whatever model, and returns how many bytes that were.
    ///
    /// # Errors
    /// When a server is using it, or a file cannot be deleted.
    pub fn wipe(dir: &Path) -> Result<u64, DiskError> {
        let mut tier = Self::inspect(dir)?;
        tier.lock = Some(lock(dir)?);
        tier.off = None;
        let bytes = tier.bytes();
        tier.clear()?;
        Ok(bytes)
    }

    fn scan(
        dir: &Path,
        fingerprint: Fingerprint,
        limits: Limits,
        lock: Option<File>,
        off: Option<DiskError>,
    ) -> io::Result<DiskTier> {
        let mut tier = DiskTier {
            dir: dir.to_owned(),
            fingerprint,
            limits,
            index: Directory::new(limits.ttl),
            segments: BTreeMap::new(),
            active: None,
            next_number: 1,
            off,
            lock,
            clock: 0,
            counters: Counters::default(),
        };
        tier.find_segments()?;
        if tier.off.is_none() {
            tier.drop_expired();
            // Nothing but a failing deletion can be wrong here, and that is remembered in `off`.
            let _ = tier.make_room(0);
        }
        Ok(tier)
    }

    fn find_segments(&mut self) -> io::Result<()> {
        let mut numbers = Vec::new();
        let mut leftovers = Vec::new();
        for file in fs::read_dir(&self.dir)? {
            let path = file?.path();
            if let Some(number) = segment::parse_name(&path, "kv") {
                numbers.push(number);
            } else if segment::parse_name(&path, "tmp").is_some()
                || segment::parse_name(&path, "idx").is_some_and(|n| !data_path(&self.dir, n).exists())
            {
                leftovers.push(path);
            }
        }
        // In the order of writing, so that of two records of a block the newer one counts.
        numbers.sort_unstable();
        self.next_number = numbers.last().map_or(1, |n| n.saturating_add(1));
        for number in numbers {
            // A segment that cannot be read, or is no longer there, holds nothing for us.
            let Ok((segment, entries)) =
                segment::load(&self.dir, number, &self.fingerprint, self.off.is_none())
            else {
                continue;
            };
            if segment.len < SEGMENT_HEADER as u64 {
                // Its writer died before it wrote anything.
                leftovers.push(data_path(&self.dir, number));
                continue;
            }
            self.segments.insert(number, segment);
            for entry in entries {
                let place = Place {
                    segment: number,
                    entry,
                };
                self.index.insert(entry.key, place);
            }
        }
        let mut order: Vec<(bool, SystemTime, u64)> = self
            .segments
            .iter()
            .map(|(&n, s)| (s.records > 0 || !s.own, s.touched, n))
            .collect();
        // Files with nothing in them go first.
        order.sort_unstable();
        for (_, _, number) in order {
            self.touch(number);
        }
        if self.off.is_none() {
            for path in leftovers {
                let _ = fs::remove_file(path);
            }
        }
        Ok(())
    }

    /// The parent of the first block of a prompt under `salt`.
    pub fn root(&self, salt: u64) -> Key {
        self.fingerprint.root(salt)
    }

    /// Why nothing is written.
    ///
    /// # Errors
    /// The reason, if so.
    pub fn writing(&self) -> Result<(), DiskError> {
        self.off.clone().map_or(Ok(()), Err)
    }

    /// Whether a block is remembered. A promise only: reading it may still find it damaged.
    pub fn contains(&self, key: &Key) -> bool {
        self.index
            .get(key)
            .is_some_and(|place| !self.expired(place.entry.created))
    }

    /// Where the blocks are, to be asked from other threads.
    pub fn directory(&self) -> Directory {
        self.index.clone()
    }

    /// How many of `tokens` are remembered under `salt`; a multiple of 32. Reads no file, so it is a promise only.
    pub fn matched(&self, salt: u64, tokens: &[u32]) -> usize {
        let mut key = self.root(salt);
        let blocks = tokens.as_chunks::<PAGE_ROWS>().0.iter();
        let known = blocks.take_while(|block| {
            key = key.child(block);
            self.contains(&key)
        });
        known.count() * PAGE_ROWS
    }

    /// Stores the block `tokens` that follows `parent`, unless it is there already. It may wait in memory until
    /// [`DiskTier::flush`].
    ///
    /// # Errors
    /// When writing is off or the block is too large. The tier goes on serving what it has.
    pub fn put(
        &mut self,
        parent: Key,
        salt: u64,
        tokens: &BlockTokens,
        payload: &[u8],
    ) -> Result<Key, DiskError> {
        let key = parent.child(tokens);
        if let Some(place) = self.index.get(&key).filter(|p| !self.expired(p.entry.created)) {
            self.touch(place.segment);
            return Ok(key);
        }
        self.writing()?;
        let bytes = record_bytes(payload.len());
        let cost = bytes + INDEX_ENTRY as u64;
        if payload.len() > MAX_PAYLOAD || EMPTY_SEGMENT + cost > self.limits.capacity {
            return Err(DiskError::Oversize {
                bytes: EMPTY_SEGMENT + cost,
                capacity: self.limits.capacity,
            });
        }
        let namespace = self.root(salt).namespace();
        let number = self.segment_for(bytes)?;
        let created = now();
        let Some(writer) = &mut self.active else {
            unreachable!("`segment_for` has opened one")
        };
        let record = writer.append(key, parent, namespace, created, tokens, payload);
        let full = writer.is_full();
        let end = writer.end();
        self.counters.bytes_written += bytes;
        if let Some(segment) = self.segments.get_mut(&number) {
            segment.len = end;
            segment.records += 1;
            segment.newest = segment.newest.max(created);
        }
        let place = Place {
            segment: number,
            entry: record.entry(),
        };
        self.index.insert(key, place);
        self.touch(number);
        if full {
            let done = self.active.as_mut().map_or(Ok(()), Writer::write_out);
            self.or_off(done)?;
        }
        Ok(key)
    }

    /// Puts everything that was stored on the disk.
    ///
    /// # Errors
    /// When writing is off or fails now; what was stored since the last `flush` may be lost.
    pub fn flush(&mut self) -> Result<(), DiskError> {
        self.writing()?;
        let done = self.active.as_mut().map_or(Ok(()), Writer::sync);
        self.or_off(done)
    }

    /// Reads the block `tokens` that follows `parent` into `payload` and returns its key, the parent of the next one. Nothing if
    /// it is not there, or not whole; then `payload` holds nothing of use.
    pub fn get(
        &mut self,
        parent: Key,
        salt: u64,
        tokens: &BlockTokens,
        payload: &mut Vec<u8>,
    ) -> Option<Key> {
        let key = parent.child(tokens);
        let namespace = self.root(salt).namespace();
        let place = self.index.get(&key);
        let place = place.filter(|p| p.entry.namespace == namespace && !self.expired(p.entry.created));
        let Some(place) = place else {
            self.counters.misses += 1;
            return None;
        };
        let record = self
            .read(place, payload)
            .filter(|r| (r.key, r.parent, r.namespace, &r.tokens) == (key, parent, namespace, tokens));
        if record.is_none() {
            // The next `put` of this block writes it anew.
            self.index.remove(&key);
            self.counters.bad += 1;
            self.counters.misses += 1;
            return None;
        }
        self.touch(place.segment);
        self.counters.hits += 1;
        self.counters.bytes_read += payload.len() as u64;
        Some(key)
    }

    /// The record at a place and its payload, if both checksums hold.
    fn read(&mut self, place: Place, payload: &mut Vec<u8>) -> Option<Record> {
        let (number, at) = (place.segment, place.entry.offset);
        let waiting = self.active.as_ref().filter(|w| w.number == number);
        if let Some(bytes) = waiting.and_then(|w| w.pending_from(at)) {
            let record = Record::read(bytes, number, at)?;
            payload.clear();
            payload.extend_from_slice(bytes.get(RECORD_HEADER..)?.get(..record.len as usize)?);
            return (format::checksum(payload) == record.payload_sum).then_some(record);
        }
        let file = File::open(data_path(&self.dir, number)).ok()?;
        let mut header = [0; RECORD_HEADER];
        segment::read_at(&file, at, &mut header).ok()?;
        let record = Record::read(&header, number, at)?;
        let whole = segment::read_payload(&file, &record, payload).ok()?;
        self.keep_time(number, &file);
        whole.then_some(record)
    }

    /// Remembers over restarts that a segment was used.
    fn keep_time(&mut self, number: u64, file: &File) {
        let now = SystemTime::now();
        let Some(segment) = self.segments.get_mut(&number).filter(|_| self.off.is_none()) else {
            return;
        };
        // A time in the future is of a clock that has been put right since.
        if now
            .duration_since(segment.touched)
            .map_or(true, |age| age >= TOUCH_EVERY)
        {
            segment.touched = now;
            let _ = file.set_modified(now);
        }
    }

    /// Forgets everything and deletes the files, those of other models as well. Writing is on again afterwards.
    ///
    /// # Errors
    /// When another process writes the folder, or a file cannot be deleted.
    pub fn clear(&mut self) -> Result<(), DiskError> {
        if self.lock.is_none() {
            self.writing()?;
        }
        self.active = None;
        self.off = None;
        let numbers: Vec<u64> = self.segments.keys().copied().collect();
        numbers.into_iter().try_for_each(|number| self.delete(number))?;
        self.next_number = 1;
        Ok(())
    }

    /// Makes sure of a segment that takes `bytes` more, and that the capacity allows it.
    fn segment_for(&mut self, bytes: u64) -> Result<u64, DiskError> {
        let limit = self.limits.segment.min(self.limits.capacity / 4);
        if self
            .active
            .as_ref()
            .is_some_and(|w| w.has_records() && w.end() + bytes > limit)
        {
            self.seal()?;
        }
        if self.active.is_none() {
            self.active = self.resume(bytes, limit);
        }
        let cost = bytes + INDEX_ENTRY as u64;
        if self.active.is_some() && !self.make_room(cost)? {
            // What remains is the active segment itself.
            self.seal()?;
        }
        if let Some(writer) = &self.active {
            return Ok(writer.number);
        }
        self.drop_expired();
        self.make_room(EMPTY_SEGMENT + cost)?;
        let number = self.next_number;
        let created = Writer::create(&self.dir, number, &self.fingerprint);
        let Some(writer) = self.or_off(created.map(Some))? else {
            unreachable!("a segment was created")
        };
        self.next_number = number.saturating_add(1);
        let segment = Segment {
            own: true,
            len: writer.end(),
            records: 0,
            newest: 0,
            last_use: 0,
            touched: SystemTime::now(),
        };
        self.segments.insert(number, segment);
        self.active = Some(writer);
        Ok(number)
    }

    /// The newest segment, if it is ours and has room: else every restart would leave a small file.
    fn resume(&mut self, bytes: u64, limit: u64) -> Option<Writer> {
        let (&number, segment) = self.segments.last_key_value()?;
        if !segment.own || segment.len + bytes > limit {
            return None;
        }
        let writer = Writer::resume(&self.dir, number, &self.fingerprint).ok()??;
        self.segments.get_mut(&number)?.len = writer.end();
        Some(writer)
    }

    /// Closes the active segment: its records are on the disk, and its index beside it.
    fn seal(&mut self) -> Result<(), DiskError> {
        self.flush()?;
        if let Some(writer) = self.active.take() {
            let entries = self.entries_of(writer.number);
            let len = writer.written();
            // Without an index the next opening reads the headers.
            let _ = segment::save_index(&self.dir, writer.number, len, &self.fingerprint, &entries);
        }
        Ok(())
    }

    /// What is found in a segment, in the order of offsets.
    fn entries_of(&self, number: u64) -> Vec<Entry> {
        let places = self.index.of_segment(number);
        let mut entries: Vec<Entry> = places.into_iter().map(|p| p.entry).collect();
        entries.sort_unstable_by_key(|e| e.offset);
        entries
    }

    /// Deletes segments, the least recently used first, until `bytes` more fit; `false` if only the active one is left.
    fn make_room(&mut self, bytes: u64) -> Result<bool, DiskError> {
        while self.bytes() + bytes > self.limits.capacity {
            let active = self.active.as_ref().map(|w| w.number);
            let idle = self.segments.iter().filter(|&(&n, _)| Some(n) != active);
            let Some((&number, _)) = idle.min_by_key(|(_, s)| s.last_use) else {
                return Ok(false);
            };
            self.delete(number)?;
            self.counters.evicted += 1;
        }
        Ok(true)
    }

    /// Deletes segments of which every block is too old.
    fn drop_expired(&mut self) {
        let active = self.active.as_ref().map(|w| w.number);
        let old: Vec<u64> = self
            .segments
            .iter()
            .filter(|&(&n, s)| Some(n) != active && s.own && s.records > 0 && self.expired(s.newest))
            .map(|(&n, _)| n)
            .collect();
        for number in old {
            if self.delete(number).is_err() {
                return;
            }
        }
    }

    fn delete(&mut self, number: u64) -> Result<(), DiskError> {
        let gone = |path: PathBuf| match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        };
        // Records first: an index alone is removed at the next opening.
        let done = gone(data_path(&self.dir, number)).and_then(|()| gone(index_path(&self.dir, number)));
        self.or_off(done)?;
        if self.segments.remove(&number).is_some_and(|s| s.own) {
            self.index.retain(|_, place| place.segment != number);
        }
        Ok(())
    }

    /// Bytes of all files.
    fn bytes(&self) -> u64 {
        self.segments.values().map(Segment::cost).sum()
    }

    fn touch(&mut self, number: u64) {
        self.clock += 1;
        if let Some(segment) = self.segments.get_mut(&number) {
            segment.last_use = self.clock;
        }
    }

    /// Switches writing off after an error. What only waited in memory is forgotten.
    fn or_off<T>(&mut self, result: io::Result<T>) -> Result<T, DiskError> {
        let source = match result {
            Ok(value) => return Ok(value),
            Err(source) => Arc::new(source),
        };
        if let Some(writer) = self.active.take() {
            let (number, written) = (writer.number, writer.written());
            self.index
                .retain(|_, p| p.segment != number || p.entry.end() <= written);
            if let Some(segment) = self.segments.get_mut(&number) {
                segment.len = written;
            }
        }
        let dir = self.dir.clone();
        let error = DiskError::Off { dir, source };
        self.off = Some(error.clone());
        Err(error)
    }

    fn expired(&self, created: u32) -> bool {
        is_expired(created, now(), self.limits.ttl)
    }
}

impl Drop for DiskTier {
    /// A clean end: everything is on the disk, and the next opening is quick.
    fn drop(&mut self) {
        let _ = self.seal();
    }
}

/// Bytes of a segment without records and of its index.
const EMPTY_SEGMENT: u64 = (SEGMENT_HEADER + INDEX_BASE) as u64;

/// A block from the future is of a clock that has been put back: it is as new as can be.
fn is_expired(created: u32, now: u32, ttl: Option<Duration>) -> bool {
    ttl.is_some_and(|ttl| u64::from(now.saturating_sub(created)) >= ttl.as_secs().max(1))
}

/// Seconds since 1970.
fn now() -> u32 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u32::try_from(since.as_secs()).unwrap_or(u32::MAX)
}

/// The folder, readable for nobody else if it is made now.
fn make_folder(dir: &Path) -> io::Result<()> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(dir)
}

/// The right to write into `dir`.
fn lock(dir: &Path) -> Result<File, DiskError> {
    let off = |source| DiskError::Off {
        dir: dir.to_owned(),
        source: Arc::new(source),
    };
    let file = segment::private(File::options().write(true).create(true).truncate(false))
        .open(dir.join("LOCK"))
        .map_err(off)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(DiskError::Locked { dir: dir.to_owned() }),
        Err(TryLockError::Error(source)) => Err(off(source)),
    }
}

#[cfg(test)]
mod tests;
