//! The segment that is being written.

use std::{
    fs::{self, File, TryLockError},
    io::{self, Seek as _, SeekFrom, Write as _},
    path::{Path, PathBuf},
};

use crate::key::{BlockTokens, Fingerprint, Key, Namespace};

use super::{
    format::{RECORD_HEADER, Record, SEGMENT_HEADER, checksum, record_bytes, write_segment_header},
    segment::{data_path, identity, index_path, private, scan},
};

/// Bytes that wait for a `flush` before they are written anyway.
const BUFFER: usize = 4 << 20;

/// Appends records to one file.
#[derive(Debug)]
pub(super) struct Writer {
    pub(super) number: u64,
    path: PathBuf,
    file: File,
    /// Bytes in the file.
    written: u64,
    /// Bytes that follow them.
    pending: Vec<u8>,
    /// The file's bytes may not be on the disk yet.
    unsynced: bool,
    /// The file's name, or the removal of its index, may not be on the disk yet.
    unnamed: bool,
}

impl Writer {
    /// A new segment.
    pub(super) fn create(dir: &Path, number: u64, fingerprint: &Fingerprint) -> io::Result<Writer> {
        let path = data_path(dir, number);
        let file = private(File::options().read(true).write(true).create_new(true)).open(&path)?;
        file.try_lock().map_err(io::Error::from)?;
        let mut pending = Vec::new();
        write_segment_header(&mut pending, number, fingerprint);
        Ok(Writer {
            number,
            path,
            file,
            written: 0,
            pending,
            unsynced: true,
            unnamed: true,
        })
    }

    /// Goes on behind the last record of a segment. Nothing when it is better left alone.
    pub(super) fn resume(dir: &Path, number: u64, fingerprint: &Fingerprint) -> io::Result<Option<Writer>> {
        let path = data_path(dir, number);
        let file = File::options().read(true).write(true).open(&path)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Ok(None),
            Err(TryLockError::Error(error)) => return Err(error),
        }
        if identity(&file, number) != Some(*fingerprint) {
            return Ok(None);
        }
        let mut end = SEGMENT_HEADER as u64;
        scan(&file, number, |record| end = record.end())?;
        // An index that survived a crash would hide the records that are written from now on.
        match fs::remove_file(index_path(dir, number)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        file.set_len(end)?;
        Ok(Some(Writer {
            number,
            path,
            file,
            written: end,
            pending: Vec::new(),
            unsynced: true,
            unnamed: true,
        }))
    }

    /// Offset of the next record.
    pub(super) fn end(&self) -> u64 {
        self.written + self.pending.len() as u64
    }

    /// Bytes in the file for sure, if not on the disk.
    pub(super) fn written(&self) -> u64 {
        self.written
    }

    /// Whether a record was ever written here.
    pub(super) fn has_records(&self) -> bool {
        self.end() > SEGMENT_HEADER as u64
    }

    /// Appends a record; it may stay in memory.
    pub(super) fn append(
        &mut self,
        key: Key,
        parent: Key,
        namespace: Namespace,
        created: u32,
        tokens: &BlockTokens,
        payload: &[u8],
    ) -> Record {
        let record = Record {
            segment: self.number,
            offset: self.end(),
            created,
            len: payload.len() as u32,
            namespace,
            key,
            parent,
            tokens: *tokens,
            payload_sum: checksum(payload),
        };
        let padded = record_bytes(payload.len()) as usize - RECORD_HEADER;
        record.write(&mut self.pending);
        self.pending.extend_from_slice(payload);
        let whole = self.pending.len() + padded - payload.len();
        self.pending.resize(whole, 0);
        record
    }

    /// Whether enough has come together to be worth a write.
    pub(super) fn is_full(&self) -> bool {
        self.pending.len() >= BUFFER
    }

    /// Hands everything to the operating system.
    pub(super) fn write_out(&mut self) -> io::Result<()> {
        if self.pending.is_empty() {
            return Ok(());
        }
        self.unsynced = true;
        self.file.seek(SeekFrom::Start(self.written))?;
        if let Err(error) = self.file.write_all(&self.pending) {
            // On a full disk half a record would only take room; a reader would see that it is torn.
            let _ = self.file.set_len(self.written);
            return Err(error);
        }
        self.written += self.pending.len() as u64;
        self.pending.clear();
        Ok(())
    }

    /// Puts everything on the disk, the file's name included.
    pub(super) fn sync(&mut self) -> io::Result<()> {
        self.write_out()?;
        // A file that was deleted under us still takes writes, and loses them.
        if fs::metadata(&self.path)?.len() != self.written {
            return Err(io::Error::other("the file is no longer the one that was written"));
        }
        if self.unsynced {
            self.file.sync_data()?;
            self.unsynced = false;
        }
        #[cfg(unix)]
        if self.unnamed
            && let Some(dir) = self.path.parent()
        {
            File::open(dir)?.sync_all()?;
            self.unnamed = false;
        }
        Ok(())
    }

    /// Bytes at `offset` that are not in the file yet.
    pub(super) fn pending_from(&self, offset: u64) -> Option<&[u8]> {
        let at = offset.checked_sub(self.written)?;
        self.pending.get(at as usize..)
    }
}
