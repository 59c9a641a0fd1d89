//! Metadata values as views into the file: nothing here owns or copies.

use std::fmt;

use crate::error::shown;

/// The type of a metadata value, numbered as in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Kind {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    Str,
    Array,
    U64,
    I64,
    F64,
}

impl Kind {
    pub(crate) fn from_id(id: u32) -> Option<Self> {
        const ALL: [Kind; 13] = [
            Kind::U8,
            Kind::I8,
            Kind::U16,
            Kind::I16,
            Kind::U32,
            Kind::I32,
            Kind::F32,
            Kind::Bool,
            Kind::Str,
            Kind::Array,
            Kind::U64,
            Kind::I64,
            Kind::F64,
        ];
        ALL.get(usize::try_from(id).ok()?).copied()
    }

    /// Bytes of one value; `None` for strings and arrays, whose size is in the file.
    pub(crate) fn width(self) -> Option<usize> {
        match self {
            Self::U8 | Self::I8 | Self::Bool => Some(1),
            Self::U16 | Self::I16 => Some(2),
            Self::U32 | Self::I32 | Self::F32 => Some(4),
            Self::U64 | Self::I64 | Self::F64 => Some(8),
            Self::Str | Self::Array => None,
        }
    }
}

/// One metadata value. Strings and arrays borrow from the file.
#[derive(Clone, Copy)]
pub enum Value<'a> {
    /// Any unsigned integer.
    U64(u64),
    /// Any signed integer.
    I64(i64),
    /// A 32-bit float.
    F32(f32),
    /// A 64-bit float.
    F64(f64),
    /// A truth value.
    Bool(bool),
    /// A string as it is in the file: meant to be UTF-8, not checked (see [`Value::as_str`]).
    Str(&'a [u8]),
    /// An array, read when iterated.
    Array(Array<'a>),
}

/// Short, whatever the file holds: for messages.
impl fmt::Debug for Value<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::U64(value) => write!(f, "{value}"),
            Self::I64(value) => write!(f, "{value}"),
            Self::F32(value) => write!(f, "{value}"),
            Self::F64(value) => write!(f, "{value}"),
            Self::Bool(value) => write!(f, "{value}"),
            Self::Str(text) => write!(f, "`{}`", shown(&String::from_utf8_lossy(text))),
            Self::Array(array) => array.fmt(f),
        }
    }
}

impl fmt::Debug for Array<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "an array of {} {:?}", self.len, self.kind)
    }
}

impl<'a> Value<'a> {
    /// Reads one value of `kind` from the start of `bytes`, which parsing has checked; also returns the rest.
    pub(crate) fn read(kind: Kind, bytes: &'a [u8]) -> Option<(Self, &'a [u8])> {
        if let Some(width) = kind.width() {
            let (raw, rest) = bytes.split_at_checked(width)?;
            let mut le = [0u8; 8];
            le[..width].copy_from_slice(raw);
            let wide = u64::from_le_bytes(le);
            let value = match kind {
                Kind::U8 | Kind::U16 | Kind::U32 | Kind::U64 => Self::U64(wide),
                Kind::I8 => Self::I64(i64::from(wide as u8 as i8)),
                Kind::I16 => Self::I64(i64::from(wide as u16 as i16)),
                Kind::I32 => Self::I64(i64::from(wide as u32 as i32)),
                Kind::I64 => Self::I64(wide as i64),
                Kind::F32 => Self::F32(f32::from_bits(wide as u32)),
                Kind::F64 => Self::F64(f64::from_bits(wide)),
                Kind::Bool => Self::Bool(wide != 0),
                Kind::Str | Kind::Array => return None,
            };
            return Some((value, rest));
        }
        if kind == Kind::Str {
            let (text, rest) = read_str(bytes)?;
            return Some((Self::Str(text), rest));
        }
        let (array, mut rest) = Array::read_head(bytes)?;
        if let Some(width) = array.kind.width() {
            let (items, after) = rest.split_at_checked(array.len.checked_mul(width)?)?;
            return Some((
                Self::Array(Array {
                    bytes: items,
                    ..array
                }),
                after,
            ));
        }
        let start = rest;
        for _ in 0..array.len {
            rest = Self::read(array.kind, rest)?.1;
        }
        let items = &start[..start.len() - rest.len()];
        Some((
            Self::Array(Array {
                bytes: items,
                ..array
            }),
            rest,
        ))
    }

    /// The value as an unsigned integer, if it is a non-negative integer.
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Self::U64(v) => Some(v),
            Self::I64(v) => u64::try_from(v).ok(),
            _ => None,
        }
    }

    /// The value as a float: floats and integers.
    pub fn as_f32(&self) -> Option<f32> {
        match *self {
            Self::F32(v) => Some(v),
            Self::F64(v) => Some(v as f32),
            Self::U64(v) => Some(v as f32),
            Self::I64(v) => Some(v as f32),
            _ => None,
        }
    }

    /// The value as a truth value.
    pub fn as_bool(&self) -> Option<bool> {
        match *self {
            Self::Bool(v) => Some(v),
            _ => None,
        }
    }

    /// The value as text, if it is a string and valid UTF-8.
    pub fn as_str(&self) -> Option<&'a str> {
        match *self {
            Self::Str(v) => std::str::from_utf8(v).ok(),
            _ => None,
        }
    }

    /// The value as an array.
    pub fn as_array(&self) -> Option<Array<'a>> {
        match *self {
            Self::Array(v) => Some(v),
            _ => None,
        }
    }
}

/// `u64` length, then that many bytes.
fn read_str(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (len, rest) = bytes.split_first_chunk::<8>()?;
    rest.split_at_checked(usize::try_from(u64::from_le_bytes(*len)).ok()?)
}

/// An array of values of one kind, still in the file. Iterating it allocates nothing.
#[derive(Clone, Copy)]
pub struct Array<'a> {
    kind: Kind,
    len: usize,
    bytes: &'a [u8],
}

impl<'a> Array<'a> {
    /// Kind and length; the items are `bytes` after it, of a length not yet known.
    fn read_head(bytes: &'a [u8]) -> Option<(Self, &'a [u8])> {
        let (kind, rest) = bytes.split_first_chunk::<4>()?;
        let (len, rest) = rest.split_first_chunk::<8>()?;
        let kind = Kind::from_id(u32::from_le_bytes(*kind))?;
        let len = usize::try_from(u64::from_le_bytes(*len)).ok()?;
        Some((
            Self {
                kind,
                len,
                bytes: rest,
            },
            rest,
        ))
    }

    /// What the items are.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// How many items there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// No items?
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All items in order.
    pub fn iter(&self) -> impl Iterator<Item = Value<'a>> + use<'a> {
        let (kind, mut left, mut rest) = (self.kind, self.len, self.bytes);
        std::iter::from_fn(move || {
            left = left.checked_sub(1)?;
            let (value, after) = Value::read(kind, rest)?;
            rest = after;
            Some(value)
        })
    }

    /// The items as byte strings; `None` if they are not strings.
    pub fn strs(&self) -> Option<impl Iterator<Item = &'a [u8]> + use<'a>> {
        let (mut left, mut rest) = (self.len, self.bytes);
        (self.kind == Kind::Str).then(|| {
            std::iter::from_fn(move || {
                left = left.checked_sub(1)?;
                let (text, after) = read_str(rest)?;
                rest = after;
                Some(text)
            })
        })
    }

    /// The items as floats; `None` if they are neither floats nor integers.
    pub fn f32s(&self) -> Option<impl Iterator<Item = f32> + use<'a>> {
        let number = !matches!(self.kind, Kind::Str | Kind::Array | Kind::Bool);
        number.then(|| self.iter().filter_map(|v| v.as_f32()))
    }

    /// The items as signed integers; `None` if they are not integers.
    pub fn i64s(&self) -> Option<impl Iterator<Item = i64> + use<'a>> {
        let integer = !matches!(
            self.kind,
            Kind::Str | Kind::Array | Kind::Bool | Kind::F32 | Kind::F64
        );
        integer.then(|| {
            self.iter().filter_map(|v| match v {
                Value::U64(v) => Some(v as i64),
                Value::I64(v) => Some(v),
                _ => None,
            })
        })
    }
}
