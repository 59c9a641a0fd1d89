//! Walks a GGUF file once, checks every length, and notes where things are.

use super::{GgufError, Kind, ggml};
use crate::error::shown;

/// Where a part of the file is; checked to lie inside it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) start: usize,
    pub(super) len: usize,
}

impl Span {
    pub(super) fn of(self, bytes: &[u8]) -> &[u8] {
        &bytes[self.start..self.start + self.len]
    }
}

/// A metadata entry: where its key and its value are.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry {
    pub(super) key: Span,
    pub(super) kind: Kind,
    pub(super) value: Span,
}

/// A tensor's line in the header, and where its data is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Line {
    pub(super) name: Span,
    pub(super) ggml_type: u32,
    pub(super) dims: [u64; 4],
    pub(super) n_dims: usize,
    pub(super) data: Span,
}

/// What a walk finds. Both tables are sorted by name and free of duplicates.
#[derive(Debug)]
pub(super) struct Tables {
    pub(super) version: u32,
    pub(super) entries: Vec<Entry>,
    pub(super) lines: Vec<Line>,
    /// Bytes before the tensor data.
    pub(super) header_len: usize,
}

/// More entries than any real file has (a few dozen), few enough that the tables stay below 64 MiB.
const MAX_ENTRIES: u64 = 1 << 16;
/// Same for tensors; the largest published models have some thousands.
const MAX_TENSORS: u64 = 1 << 17;
/// Longest key or tensor name.
const MAX_NAME: u64 = 1 << 16;
/// Arrays in arrays in ...; real files have one level.
const MAX_DEPTH: usize = 4;
/// Smallest entry: length, one-byte value and its kind. Smallest tensor line: length, n_dims, type, offset.
const MIN_ENTRY: u64 = 8 + 4 + 1;
const MIN_LINE: u64 = 8 + 4 + 4 + 8;

struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn left(&self) -> u64 {
        (self.bytes.len() - self.at) as u64
    }

    fn take(&mut self, len: u64, what: &'static str) -> Result<Span, GgufError> {
        if len > self.left() {
            return Err(GgufError::Truncated {
                what,
                at: self.at as u64,
                need: len,
                left: self.left(),
            });
        }
        let span = Span {
            start: self.at,
            len: len as usize,
        };
        self.at += span.len;
        Ok(span)
    }

    fn u32(&mut self, what: &'static str) -> Result<u32, GgufError> {
        let span = self.take(4, what)?;
        Ok(u32::from_le_bytes(
            span.of(self.bytes).try_into().expect("four bytes were taken"),
        ))
    }

    fn u64(&mut self, what: &'static str) -> Result<u64, GgufError> {
        let span = self.take(8, what)?;
        Ok(u64::from_le_bytes(
            span.of(self.bytes).try_into().expect("eight bytes were taken"),
        ))
    }

    /// A count of things that take at least `min` bytes each.
    fn count(&mut self, what: &'static str, min: u64, limit: u64) -> Result<u64, GgufError> {
        let count = self.u64(what)?;
        let limit = limit.min(self.left() / min);
        if count > limit {
            return Err(GgufError::TooMany { what, count, limit });
        }
        Ok(count)
    }

    fn string(&mut self, what: &'static str, limit: u64) -> Result<Span, GgufError> {
        let len = self.u64(what)?;
        if len > limit {
            return Err(GgufError::TooMany {
                what,
                count: len,
                limit,
            });
        }
        self.take(len, what)
    }

    fn name(&mut self, what: &'static str) -> Result<(Span, &'a str), GgufError> {
        let at = self.at as u64;
        let span = self.string(what, MAX_NAME)?;
        match std::str::from_utf8(span.of(self.bytes)) {
            Ok(name) => Ok((span, name)),
            Err(_) => Err(GgufError::NotUtf8 { what, at }),
        }
    }

    fn kind(&mut self) -> Result<Kind, GgufError> {
        let at = self.at as u64;
        let id = self.u32("value type")?;
        Kind::from_id(id).ok_or(GgufError::UnknownKind { id, at })
    }

    fn skip_value(&mut self, kind: Kind, depth: usize) -> Result<(), GgufError> {
        if let Some(width) = kind.width() {
            self.take(width as u64, "metadata value")?;
        } else if kind == Kind::Str {
            self.string("string", u64::MAX)?;
        } else {
            if depth == MAX_DEPTH {
                return Err(GgufError::TooDeep {
                    at: self.at as u64,
                    limit: MAX_DEPTH,
                });
            }
            let item = self.kind()?;
            // A string takes at least its length, an array its kind and its length.
            let min = item.width().unwrap_or(if item == Kind::Str { 8 } else { 12 }) as u64;
            let count = self.count("array length", min, u64::MAX)?;
            if item.width().is_some() {
                // Cannot overflow: `count` checked that `count * min` bytes are left.
                self.take(count * min, "array items")?;
            } else {
                for _ in 0..count {
                    self.skip_value(item, depth + 1)?;
                }
            }
        }
        Ok(())
    }
}

/// A tensor line before the start of the data is known.
struct RawLine {
    line: Line,
    offset: u64,
    len: u64,
}

fn read_line(cur: &mut Cursor<'_>) -> Result<RawLine, GgufError> {
    let (name_span, name) = cur.name("tensor name")?;
    let bad = |what: String| GgufError::Tensor {
        tensor: shown(name),
        what,
    };
    let n_dims = cur.u32("number of dimensions")?;
    if !(1..=4).contains(&n_dims) {
        return Err(bad(format!("has {n_dims} dimensions, 1 to 4 are possible")));
    }
    let mut dims = [1u64; 4];
    for dim in &mut dims[..n_dims as usize] {
        *dim = cur.u64("dimension")?;
    }
    let ggml_type = cur.u32("tensor type")?;
    let offset = cur.u64("tensor offset")?;
    let Some((block_len, block_bytes)) = ggml::block(ggml_type) else {
        return Err(bad(format!("has the unknown type {ggml_type}")));
    };
    if dims.contains(&0) {
        return Err(bad(format!(
            "has an empty dimension: {:?}",
            &dims[..n_dims as usize]
        )));
    }
    if !dims[0].is_multiple_of(block_len) {
        return Err(bad(format!(
            "has rows of {} values, its type needs multiples of {block_len}",
            dims[0]
        )));
    }
    let len = dims[1..]
        .iter()
        .try_fold(dims[0] / block_len, |acc, &dim| acc.checked_mul(dim))
        .and_then(|blocks| blocks.checked_mul(block_bytes))
        .ok_or_else(|| {
            bad(format!(
                "has dimensions {dims:?}, more bytes than 64 bits can count"
            ))
        })?;
    let line = Line {
        name: name_span,
        ggml_type,
        dims,
        n_dims: n_dims as usize,
        data: Span { start: 0, len: 0 },
    };
    Ok(RawLine { line, offset, len })
}

/// Walks the file. Allocates two tables whose sizes the file's own length and the limits above bound.
pub(super) fn walk(bytes: &[u8]) -> Result<Tables, GgufError> {
    let mut cur = Cursor { bytes, at: 0 };
    let magic = cur.take(4, "magic number")?.of(bytes);
    if magic != b"GGUF" {
        return Err(GgufError::Magic {
            got: [magic[0], magic[1], magic[2], magic[3]],
        });
    }
    let version = cur.u32("version")?;
    if !(2..=3).contains(&version) {
        return Err(GgufError::Version { got: version });
    }
    let tensors = cur.u64("tensor count")?;
    let n_entries = cur.count("metadata count", MIN_ENTRY, MAX_ENTRIES)?;
    let limit = MAX_TENSORS.min(cur.left() / MIN_LINE);
    if tensors > limit {
        return Err(GgufError::TooMany {
            what: "tensor count",
            count: tensors,
            limit,
        });
    }

    let mut entries = Vec::with_capacity(n_entries as usize);
    for _ in 0..n_entries {
        let (key, _) = cur.name("metadata key")?;
        let kind = cur.kind()?;
        let start = cur.at;
        cur.skip_value(kind, 0)?;
        entries.push(Entry {
            key,
            kind,
            value: Span {
                start,
                len: cur.at - start,
            },
        });
    }
    sort_names(&mut entries, bytes, |e| e.key, "metadata key")?;

    let alignment = alignment(&entries, bytes)?;
    let mut raw = Vec::with_capacity(tensors as usize);
    for _ in 0..tensors {
        raw.push(read_line(&mut cur)?);
    }
    let file_len = bytes.len() as u64;
    let data_start = (cur.at as u64).next_multiple_of(alignment);
    let mut lines = Vec::with_capacity(raw.len());
    for RawLine {
        mut line,
        offset,
        len,
    } in raw
    {
        let tensor = || shown(&String::from_utf8_lossy(line.name.of(bytes)));
        if !offset.is_multiple_of(alignment) {
            let what = format!("starts at {offset}, which is not a multiple of the alignment {alignment}");
            return Err(GgufError::Tensor {
                tensor: tensor(),
                what,
            });
        }
        let start = data_start.checked_add(offset);
        let end = start.and_then(|start| start.checked_add(len));
        match (start, end) {
            (Some(start), Some(end)) if end <= file_len => {
                line.data = Span {
                    start: start as usize,
                    len: len as usize,
                };
            }
            _ => {
                return Err(GgufError::TensorOutside {
                    tensor: tensor(),
                    offset,
                    len,
                    data_start,
                    file_len,
                });
            }
        }
        lines.push(line);
    }
    sort_names(&mut lines, bytes, |l| l.name, "tensor")?;
    Ok(Tables {
        version,
        entries,
        lines,
        header_len: cur.at,
    })
}

/// `general.alignment`, 32 if it is not there; a power of two up to 64 KiB.
fn alignment(entries: &[Entry], bytes: &[u8]) -> Result<u64, GgufError> {
    let Some(entry) = find(entries, bytes, |e| e.key, "general.alignment") else {
        return Ok(32);
    };
    let value = super::Value::read(entry.kind, entry.value.of(bytes)).and_then(|(v, _)| v.as_u64());
    match value {
        Some(v) if v.is_power_of_two() && v <= 1 << 16 => Ok(v),
        _ => Err(GgufError::Alignment { got: value }),
    }
}

fn sort_names<T>(
    table: &mut [T],
    bytes: &[u8],
    name: impl Fn(&T) -> Span,
    what: &'static str,
) -> Result<(), GgufError> {
    table.sort_unstable_by(|a, b| name(a).of(bytes).cmp(name(b).of(bytes)));
    match table
        .windows(2)
        .find(|w| name(&w[0]).of(bytes) == name(&w[1]).of(bytes))
    {
        Some(w) => {
            let name = shown(&String::from_utf8_lossy(name(&w[0]).of(bytes)));
            Err(GgufError::Duplicate { what, name })
        }
        None => Ok(()),
    }
}

/// Finds a name in a sorted table.
pub(super) fn find<'t, T>(
    table: &'t [T],
    bytes: &[u8],
    name: impl Fn(&T) -> Span,
    wanted: &str,
) -> Option<&'t T> {
    table
        .binary_search_by(|item| name(item).of(bytes).cmp(wanted.as_bytes()))
        .ok()
        .map(|at| &table[at])
}
