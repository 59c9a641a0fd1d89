//! Bytes on disk. All numbers are little-endian, all checksums xxh3-64.
//!
//! ```text
//! segment file   header (64 B), then records, each at a multiple of 64
//!   header       magic 8, version 4, zero 4, segment number 8, identity 32, checksum 8
//!   record       magic 8, segment number 8, own offset 8, created 4, payload length 4, namespace 16, key 32, parent 32,
//!                tokens 32 x 4, checksum of the payload 8, checksum of the 248 bytes before 8; payload; zeros up to 64
//! index file     magic 8, version 4, records 4, segment number 8, length of the segment file 8, identity 32;
//!                a record each: key 32, namespace 16, offset 8, payload length 4, created 4; checksum 8
//! ```
//! A record names its segment and its offset: bytes that a disk, a copy or a repair has put elsewhere are no record.

use twox_hash::XxHash3_64;

use crate::key::{BlockTokens, Fingerprint, Key, Namespace};

/// Records start at multiples of this, so that a search for the next one after damage looks at few places.
pub(super) const ALIGN: u64 = 64;
pub(super) const SEGMENT_HEADER: usize = 64;
pub(super) const RECORD_HEADER: usize = 256;
pub(super) const INDEX_ENTRY: usize = 64;
/// Bytes of an index of no records.
pub(super) const INDEX_BASE: usize = 72;
/// Bytes of a payload at most: 32 tokens of the largest models stay far below.
pub(super) const MAX_PAYLOAD: usize = 1 << 30;

const SEGMENT_MAGIC: [u8; 8] = *b"AFXKVSEG";
pub(super) const RECORD_MAGIC: [u8; 8] = *b"AFXBLOCK";
const INDEX_MAGIC: [u8; 8] = *b"AFXINDEX";
const VERSION: u32 = 1;

pub(super) fn checksum(bytes: &[u8]) -> u64 {
    XxHash3_64::oneshot(bytes)
}

/// Bytes that a record of `payload` bytes takes in its file.
pub(super) fn record_bytes(payload: usize) -> u64 {
    (RECORD_HEADER as u64 + payload as u64).next_multiple_of(ALIGN)
}

/// Reads fields one after the other.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn bytes<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (field, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*field)
    }

    fn u32(&mut self) -> Option<u32> {
        self.bytes().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.bytes().map(u64::from_le_bytes)
    }
}

/// Appends the checksum of what `bytes` holds from `start` on.
fn seal(bytes: &mut Vec<u8>, start: usize) {
    let sum = checksum(&bytes[start..]);
    bytes.extend(sum.to_le_bytes());
}

/// The bytes before a trailing checksum, if it is right.
fn unseal(bytes: &[u8]) -> Option<&[u8]> {
    let (body, sum) = bytes.split_last_chunk()?;
    (checksum(body) == u64::from_le_bytes(*sum)).then_some(body)
}

pub(super) fn write_segment_header(out: &mut Vec<u8>, number: u64, fingerprint: &Fingerprint) {
    let start = out.len();
    out.extend(SEGMENT_MAGIC);
    out.extend(VERSION.to_le_bytes());
    out.extend([0; 4]);
    out.extend(number.to_le_bytes());
    out.extend(fingerprint.0);
    seal(out, start);
}

/// The identity of segment `number`, if these bytes are its header.
pub(super) fn read_segment_header(bytes: &[u8], number: u64) -> Option<Fingerprint> {
    let mut fields = Fields(unseal(bytes)?);
    let known = fields.bytes()? == SEGMENT_MAGIC && fields.u32()? == VERSION;
    let here = fields.bytes()? == [0; 4] && fields.u64()? == number;
    (known && here).then_some(())?;
    fields.bytes().map(Fingerprint)
}

/// What stands before a payload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) segment: u64,
    pub(super) offset: u64,
    /// Seconds since 1970.
    pub(super) created: u32,
    /// Bytes of the payload.
    pub(super) len: u32,
    pub(super) namespace: Namespace,
    pub(super) key: Key,
    pub(super) parent: Key,
    pub(super) tokens: BlockTokens,
    pub(super) payload_sum: u64,
}

impl Record {
    pub(super) fn write(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend(RECORD_MAGIC);
        out.extend(self.segment.to_le_bytes());
        out.extend(self.offset.to_le_bytes());
        out.extend(self.created.to_le_bytes());
        out.extend(self.len.to_le_bytes());
        out.extend(self.namespace.0);
        out.extend(self.key.0);
        out.extend(self.parent.0);
        self.tokens.iter().for_each(|t| out.extend(t.to_le_bytes()));
        out.extend(self.payload_sum.to_le_bytes());
        seal(out, start);
    }

    /// The record at `offset` of segment `segment`, if these bytes are its header.
    pub(super) fn read(bytes: &[u8], segment: u64, offset: u64) -> Option<Record> {
        let bytes = bytes.get(..RECORD_HEADER)?;
        (bytes.starts_with(&RECORD_MAGIC)).then_some(())?;
        let mut fields = Fields(unseal(bytes)?);
        fields.bytes::<8>()?;
        let mut record = Record {
            segment: fields.u64()?,
            offset: fields.u64()?,
            created: fields.u32()?,
            len: fields.u32()?,
            namespace: Namespace(fields.bytes()?),
            key: Key(fields.bytes()?),
            parent: Key(fields.bytes()?),
            tokens: [0; _],
            payload_sum: 0,
        };
        for token in &mut record.tokens {
            *token = fields.u32()?;
        }
        record.payload_sum = fields.u64()?;
        (record.segment == segment && record.offset == offset).then_some(record)
    }

    /// Offset behind the record.
    pub(super) fn end(&self) -> u64 {
        self.offset.saturating_add(record_bytes(self.len as usize))
    }

    pub(super) fn entry(&self) -> Entry {
        Entry {
            key: self.key,
            namespace: self.namespace,
            offset: self.offset,
            len: self.len,
            created: self.created,
        }
    }
}

/// What is remembered of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) key: Key,
    pub(super) namespace: Namespace,
    pub(super) offset: u64,
    pub(super) len: u32,
    pub(super) created: u32,
}

impl Entry {
    /// Offset behind the record.
    pub(super) fn end(&self) -> u64 {
        self.offset.saturating_add(record_bytes(self.len as usize))
    }
}

/// An index file of segment `number`, whose file has `data_len` bytes.
pub(super) fn write_index(
    number: u64,
    data_len: u64,
    fingerprint: &Fingerprint,
    entries: &[Entry],
) -> Vec<u8> {
    let mut out = Vec::with_capacity(INDEX_BASE + entries.len() * INDEX_ENTRY);
    out.extend(INDEX_MAGIC);
    out.extend(VERSION.to_le_bytes());
    out.extend((entries.len() as u32).to_le_bytes());
    out.extend(number.to_le_bytes());
    out.extend(data_len.to_le_bytes());
    out.extend(fingerprint.0);
    for entry in entries {
        out.extend(entry.key.0);
        out.extend(entry.namespace.0);
        out.extend(entry.offset.to_le_bytes());
        out.extend(entry.len.to_le_bytes());
        out.extend(entry.created.to_le_bytes());
    }
    seal(&mut out, 0);
    out
}

/// The records of segment `number`, if these bytes are the index of a file of `data_len` bytes.
pub(super) fn read_index(
    bytes: &[u8],
    number: u64,
    data_len: u64,
    fingerprint: &Fingerprint,
) -> Option<Vec<Entry>> {
    let mut fields = Fields(unseal(bytes)?);
    let known = fields.bytes()? == INDEX_MAGIC && fields.u32()? == VERSION;
    let count = fields.u32()? as usize;
    let here = fields.u64()? == number && fields.u64()? == data_len && fields.bytes()? == fingerprint.0;
    (known && here && fields.0.len() == count.checked_mul(INDEX_ENTRY)?).then_some(())?;
    let mut entries = Vec::with_capacity(count);
    for _ in 0..count {
        entries.push(Entry {
            key: Key(fields.bytes()?),
            namespace: Namespace(fields.bytes()?),
            offset: fields.u64()?,
            len: fields.u32()?,
            created: fields.u32()?,
        });
    }
    entries.iter().all(|e| e.end() <= data_len).then_some(entries)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Record {
        let parent = Key([3; 32]);
        let tokens = std::array::from_fn(|i| i as u32 * 1000);
        Record {
            segment: 7,
            offset: 640,
            created: 1_700_000_000,
            len: 99,
            namespace: Namespace([9; 16]),
            key: parent.child(&tokens),
            parent,
            tokens,
            payload_sum: 42,
        }
    }

    #[test]
    fn a_record_reads_back_only_at_its_own_place() {
        let mut bytes = Vec::new();
        record().write(&mut bytes);
        assert_eq!(bytes.len(), RECORD_HEADER);
        assert_eq!(Record::read(&bytes, 7, 640), Some(record()));
        assert_eq!(Record::read(&bytes, 8, 640), None);
        assert_eq!(Record::read(&bytes, 7, 704), None);
        for len in 0..RECORD_HEADER {
            assert_eq!(Record::read(&bytes[..len], 7, 640), None);
        }
    }

    #[test]
    fn any_flipped_bit_of_a_header_or_an_index_is_seen() {
        let mut headers = [Vec::new(), Vec::new()];
        record().write(&mut headers[0]);
        write_segment_header(&mut headers[1], 7, &Fingerprint([5; 32]));
        let index = write_index(7, 1024, &Fingerprint([5; 32]), &[record().entry()]);
        assert_eq!(headers[1].len(), SEGMENT_HEADER);
        assert_eq!(index.len(), INDEX_BASE + INDEX_ENTRY);
        assert_eq!(read_segment_header(&headers[1], 7), Some(Fingerprint([5; 32])));
        assert_eq!(
            read_index(&index, 7, 1024, &Fingerprint([5; 32])),
            Some(vec![record().entry()])
        );
        assert_eq!(read_index(&index, 7, 1025, &Fingerprint([5; 32])), None);
        let flips = |bytes: &[u8], read: &dyn Fn(&[u8]) -> bool| {
            assert!(read(bytes));
            for bit in 0..bytes.len() * 8 {
                let mut bad = bytes.to_vec();
                bad[bit / 8] ^= 1 << (bit % 8);
                assert!(!read(&bad), "bit {bit}");
            }
        };
        flips(&headers[0], &|b| Record::read(b, 7, 640).is_some());
        flips(&headers[1], &|b| read_segment_header(b, 7).is_some());
        flips(&index, &|b| {
            read_index(b, 7, 1024, &Fingerprint([5; 32])).is_some()
        });
    }
}
