//! Filters and methods that the interpreter does not pay for as they work: here they pay before.
//!
//! A list that holds another list twice, sixty times over, is small until something walks it. The interpreter's own filters
//! charge fuel for what they visit; Python's methods, which come from elsewhere, and our `tojson` would not.

use std::borrow::Cow;

use minijinja::value::{Kwargs, StringInput, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, filters};
use minijinja_contrib::pycompat;
use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};

use super::meter;

/// Lists and maps in one another, where they are written out.
const MAX_DEPTH: usize = 128;

/// The longest run of digits in a format: widths and precisions have up to three.
const MAX_WIDTH_DIGITS: usize = 3;

pub(super) fn install(env: &mut Environment<'_>) {
    // Prints everything there is, at no cost; templates have no use for it.
    env.remove_global("debug");
    env.set_debug(false);
    env.set_unknown_method_callback(method);
    env.add_filter("tojson", to_json);
    env.add_filter("trim", trim);
    env.add_filter(meter::PAID, paid);
}

/// Charges for a walk over a value.
fn paid(state: &State, value: Value) -> Result<Value, Error> {
    pay(state, &value, 0)?;
    Ok(value)
}

/// Python's methods of strings, lists and maps.
fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    let own = pay(state, value, 0)?;
    let mut given = 0;
    for arg in args {
        given += pay(state, arg, 0)?;
    }
    match (name, value.as_str()) {
        ("strip" | "lstrip" | "rstrip", Some(_)) => pay_bytes(state, own.saturating_mul(given))?,
        ("format", Some(text)) => {
            check_format(text)?;
            let fields = text.matches('{').count();
            pay_bytes(state, fields.saturating_mul(given + 1000))?;
        }
        _ => {}
    }
    pycompat::unknown_method_callback(state, value, name, args)
}

/// Each character is looked for in `chars`, one by one.
fn trim(state: &State, value: &Value, chars: Option<Cow<'_, str>>) -> Result<Value, Error> {
    let chars_len = chars.as_ref().map_or(1, |c| c.len());
    let len = value.as_str().map_or(0, str::len);
    pay_bytes(state, len.saturating_mul(chars_len))?;
    Ok(filters::trim(StringInput::new(state, value)?, chars))
}

fn pay_bytes(state: &State, bytes: usize) -> Result<(), Error> {
    state.consume_fuel(bytes as u64 / 64)
}

/// Pays for a walk over `value` and for its text, which has about as many bytes as returned.
fn pay(state: &State, value: &Value, depth: usize) -> Result<usize, Error> {
    if depth > MAX_DEPTH {
        return Err(too_deep());
    }
    // Of short strings, too, there can be millions.
    state.consume_fuel(1)?;
    if let Some(text) = value.as_str() {
        pay_bytes(state, text.len())?;
        return Ok(text.len() + 2);
    }
    let mut bytes = 24;
    // An iterator that ends once it has been walked has no length.
    let again = value.kind() != ValueKind::Iterable || value.len().is_some();
    if again
        && let ValueKind::Seq | ValueKind::Iterable | ValueKind::Map = value.kind()
        && let Ok(items) = value.try_iter()
    {
        let is_map = value.kind() == ValueKind::Map;
        for item in items {
            if is_map {
                bytes += pay(state, &value.get_item(&item)?, depth + 1)?;
            }
            bytes += pay(state, &item, depth + 1)?;
        }
    }
    Ok(bytes)
}

fn too_deep() -> Error {
    let what = format!("lists and maps are nested deeper than {MAX_DEPTH}");
    Error::new(ErrorKind::InvalidOperation, what)
}

/// Refuses widths that are long or computed.
fn check_format(text: &str) -> Result<(), Error> {
    let (mut open, mut digits) = (false, 0);
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        // Doubled braces are themselves.
        if !open && (c == '{' || c == '}') && chars.peek() == Some(&c) {
            chars.next();
            continue;
        }
        digits = if c.is_ascii_digit() { digits + 1 } else { 0 };
        if open && (c == '{' || digits > MAX_WIDTH_DIGITS) {
            let what = "formats have widths of up to three digits";
            return Err(Error::new(ErrorKind::InvalidOperation, what));
        }
        open = (open || c == '{') && c != '}';
    }
    Ok(())
}

/// `json.dumps(value, ensure_ascii=False)`, as templates written for Python expect it: a space after commas and colons.
fn to_json(state: &State, value: &Value, kwargs: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    let mut out = Paid {
        state,
        bytes: Vec::new(),
    };
    let done = match indent {
        Some(indent) => {
            let spaces = vec![b' '; indent.min(16)];
            let formatter = Shallow(PrettyFormatter::with_indent(&spaces), 0);
            value.serialize(&mut Serializer::with_formatter(&mut out, formatter))
        }
        None => value.serialize(&mut Serializer::with_formatter(&mut out, Shallow(Python, 0))),
    };
    if let Err(e) = done {
        // Whether it was the fuel that ended it.
        state.consume_fuel(1)?;
        return Err(Error::new(ErrorKind::BadSerialization, e.to_string()));
    }
    Ok(Value::from_safe_string(
        String::from_utf8_lossy(&out.bytes).into_owned(),
    ))
}

/// Pays for what is written: twice, because it is copied.
struct Paid<'a, 'env, 'vm> {
    state: &'a State<'env, 'vm>,
    bytes: Vec<u8>,
}

impl std::io::Write for Paid<'_, '_, '_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let before = self.bytes.len() / 32;
        let after = (self.bytes.len() + bytes.len()) / 32;
        self.state
            .consume_fuel((after - before) as u64)
            .map_err(std::io::Error::other)?;
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Python's separators.
struct Python;

impl Formatter for Python {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        w: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { w.write_all(b", ") }
    }
    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        w: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { w.write_all(b", ") }
    }
    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, w: &mut W) -> std::io::Result<()> {
        w.write_all(b": ")
    }
}

/// A formatter that stops at [`MAX_DEPTH`].
struct Shallow<F>(F, usize);

impl<F> Shallow<F> {
    fn deeper(&mut self) -> std::io::Result<()> {
        self.1 += 1;
        if self.1 > MAX_DEPTH {
            return Err(std::io::Error::other(too_deep()));
        }
        Ok(())
    }
}

impl<F: Formatter> Formatter for Shallow<F> {
    fn begin_array<W: ?Sized + std::io::Write>(&mut self, w: &mut W) -> std::io::Result<()> {
        self.deeper()?;
        self.0.begin_array(w)
    }
    fn end_array<W: ?Sized + std::io::Write>(&mut self, w: &mut W) -> std::io::Result<()> {
        self.1 -= 1;
        self.0.end_array(w)
    }
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        w: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        self.0.begin_array_value(w, first)
    }
    fn end_array_value<W: ?Sized + std::io::Write>(&mut self, w: &mut W) -> std::io::Result<()> {
        self.0.end_array_value(w)
    }
    fn begin_object<W: ?Sized + std::io::Write>(&mut self, w: &mut W) -> std::io::Result<()> {
        self.deeper()?;
        self.0.begin_object(w)
    }
    fn end_object<W: ?Sized + std::io::Write>(&mut self, w: &mut W) -> std::io::Result<()> {
        self.1 -= 1;
        self.0.end_object(w)
    }
    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        w: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        self.0.begin_object_key(w, first)
    }
    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, w: &mut W) -> std::io::Result<()> {
        self.0.begin_object_value(w)
    }
    fn end_object_value<W: ?Sized + std::io::Write>(&mut self, w: &mut W) -> std::io::Result<()> {
        self.0.end_object_value(w)
    }
}
