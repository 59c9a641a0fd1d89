//! Segment files as they are found: what is in them, whatever happened to them.

use std::{
    fs::{self, File},
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    ops::Range,
    path::{Path, PathBuf},
    time::SystemTime,
};

use crate::key::{Fingerprint, hex};

use super::format::{
    ALIGN, Entry, INDEX_BASE, INDEX_ENTRY, RECORD_HEADER, RECORD_MAGIC, Record, SEGMENT_HEADER, checksum,
    read_index, read_segment_header, write_index,
};

/// What is known of a segment.
#[derive(Debug)]
pub(super) struct Segment {
    /// Of our identity; the others only take room.
    pub(super) own: bool,
    /// Bytes of the file, those waiting to be written included.
    pub(super) len: u64,
    /// Records in it, dead ones included.
    pub(super) records: u64,
    /// Creation of its newest record.
    pub(super) newest: u32,
    /// Order of use in this process.
    pub(super) last_use: u64,
    /// Modification time of the file: order of use over restarts.
    pub(super) touched: SystemTime,
}

impl Segment {
    /// Bytes on disk, the index file that it has or will get included.
    pub(super) fn cost(&self) -> u64 {
        self.len + INDEX_BASE as u64 + self.records * INDEX_ENTRY as u64
    }
}

pub(super) fn data_path(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("{number:016x}.kv"))
}

pub(super) fn index_path(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("{number:016x}.idx"))
}

/// The number of a file that we have named.
pub(super) fn parse_name(path: &Path, extension: &str) -> Option<u64> {
    let stem = path.file_stem()?.to_str()?;
    let ours = path.extension()? == extension && stem.len() == 16;
    let number = u64::from_str_radix(stem, 16).ok()?;
    (ours && format!("{number:016x}") == stem).then_some(number)
}

/// Opens a file for a new purpose; on Unix nobody else may read it, for it holds what people have written.
pub(super) fn private(options: &mut fs::OpenOptions) -> &mut fs::OpenOptions {
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(options, 0o600);
    options
}

pub(super) fn read_at(mut file: &File, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
    file.seek(SeekFrom::Start(offset))?;
    file.read_exact(bytes)
}

/// Reads the payload of `record` into `payload`; `false` when it is not what was written.
pub(super) fn read_payload(mut file: &File, record: &Record, payload: &mut Vec<u8>) -> io::Result<bool> {
    payload.clear();
    file.seek(SeekFrom::Start(record.offset + RECORD_HEADER as u64))?;
    // `take` and not a resized buffer: a length that lies allocates no more than the file has.
    payload.reserve(record.len as usize);
    file.take(u64::from(record.len)).read_to_end(payload)?;
    Ok(payload.len() == record.len as usize && checksum(payload) == record.payload_sum)
}

/// The identity that a segment's header names. Nothing when the header is damaged.
pub(super) fn identity(file: &File, number: u64) -> Option<Fingerprint> {
    let mut header = [0; SEGMENT_HEADER];
    read_at(file, 0, &mut header).ok()?;
    read_segment_header(&header, number)
}

/// Finds the records of a segment by their headers; payloads are not read. Returns the ranges that hold none.
pub(super) fn scan(file: &File, number: u64, mut visit: impl FnMut(Record)) -> io::Result<Vec<Range<u64>>> {
    let len = file.metadata()?.len();
    let mut gaps = Vec::new();
    let mut header = [0; RECORD_HEADER];
    let mut at = SEGMENT_HEADER as u64;
    while at + RECORD_HEADER as u64 <= len {
        read_at(file, at, &mut header)?;
        match Record::read(&header, number, at).filter(|r| r.end() <= len) {
            Some(record) => {
                at = record.end();
                visit(record);
            }
            None => {
                let next = next_magic(file, at + ALIGN, len)?;
                gaps.push(at..next);
                at = next;
            }
        }
    }
    if at < len {
        gaps.push(at..len);
    }
    Ok(gaps)
}

/// The next place at or after `from` where a record may begin, or `len`.
fn next_magic(file: &File, from: u64, len: u64) -> io::Result<u64> {
    let mut window = vec![0; 64 << 10];
    let mut at = from;
    while at < len {
        let here = window.len().min((len - at) as usize);
        read_at(file, at, &mut window[..here])?;
        let mut places = window[..here].chunks(ALIGN as usize);
        if let Some(place) = places.position(|c| c.starts_with(&RECORD_MAGIC)) {
            return Ok(at + place as u64 * ALIGN);
        }
        at += here as u64;
    }
    Ok(len)
}

/// A segment's file and the records in it, from the index file if there is a right one, else from the headers.
/// `rewrite`: put a right index file there.
pub(super) fn load(
    dir: &Path,
    number: u64,
    fingerprint: &Fingerprint,
    rewrite: bool,
) -> io::Result<(Segment, Vec<Entry>)> {
    let file = File::open(data_path(dir, number))?;
    let meta = file.metadata()?;
    let mut segment = Segment {
        own: true,
        len: meta.len(),
        records: 0,
        newest: 0,
        last_use: 0,
        touched: meta.modified().unwrap_or(SystemTime::UNIX_EPOCH),
    };
    if identity(&file, number).is_some_and(|found| found != *fingerprint) {
        segment.own = false;
        let index = fs::metadata(index_path(dir, number)).map_or(0, |m| m.len());
        segment.records = index.saturating_sub(INDEX_BASE as u64) / INDEX_ENTRY as u64;
        return Ok((segment, Vec::new()));
    }
    let indexed = fs::read(index_path(dir, number))
        .ok()
        .and_then(|bytes| read_index(&bytes, number, meta.len(), fingerprint));
    let entries = match indexed {
        Some(entries) => entries,
        None => {
            let mut entries = Vec::new();
            scan(&file, number, |record| entries.push(record.entry()))?;
            if rewrite {
                // Only a shortcut for the next opening.
                let _ = save_index(dir, number, meta.len(), fingerprint, &entries);
            }
            entries
        }
    };
    segment.records = entries.len() as u64;
    segment.newest = entries.iter().map(|e| e.created).max().unwrap_or(0);
    Ok((segment, entries))
}

/// Writes the index file of a segment, whole or not at all.
pub(super) fn save_index(
    dir: &Path,
    number: u64,
    data_len: u64,
    fingerprint: &Fingerprint,
    entries: &[Entry],
) -> io::Result<()> {
    let bytes = write_index(number, data_len, fingerprint, entries);
    let temporary = dir.join(format!("{number:016x}.tmp"));
    let mut options = File::options();
    let written = private(options.write(true).create(true).truncate(true))
        .open(&temporary)
        .and_then(|mut file| file.write_all(&bytes))
        .and_then(|()| fs::rename(&temporary, index_path(dir, number)));
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written
}

/// A hash as it is shown.
pub(super) fn short(hash: &[u8]) -> String {
    hex(&hash[..8])
}
