//! Pre-tokenizers: where byte-level BPE cuts text into pieces, written out by hand so that every input takes linear time.

use unicode_properties::{GeneralCategoryGroup, UnicodeGeneralCategory};

/// How text is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pre {
    /// GPT-2's pattern.
    Gpt2,
    /// Each digit alone, then GPT-2's pattern.
    SmolLm,
    /// GPT-4's pattern with single digits, on NFC text.
    Qwen2,
    /// GPT-4's pattern with digits in threes.
    Llama3,
}

impl Pre {
    pub(super) const NAMES: [&'static str; 6] =
        ["default", "gpt-2", "smollm", "qwen2", "llama-bpe", "llama3"];

    pub(super) fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "default" | "gpt-2" => Self::Gpt2,
            "smollm" => Self::SmolLm,
            "qwen2" => Self::Qwen2,
            "llama-bpe" | "llama3" => Self::Llama3,
            _ => return None,
        })
    }

    pub(super) fn is_nfc(self) -> bool {
        self == Self::Qwen2
    }

    /// Whether a piece that is a token needs no merging.
    pub(super) fn whole_pieces_first(self) -> bool {
        self == Self::Llama3
    }

    /// The pieces of `text`, in order, without gaps.
    pub(super) fn split(self, text: &str) -> impl Iterator<Item = &str> {
        let mut rest = text;
        // Bytes up to the next number, found once for all the pieces before it.
        let mut plain = 0;
        std::iter::from_fn(move || {
            if rest.is_empty() {
                return None;
            }
            let len = match self {
                Self::Gpt2 => gpt2(rest),
                Self::SmolLm => smollm(rest, &mut plain),
                Self::Qwen2 => gpt4(rest, 1),
                Self::Llama3 => gpt4(rest, 3),
            };
            let (piece, tail) = rest.split_at(len);
            rest = tail;
            Some(piece)
        })
    }
}

fn is_letter(c: char) -> bool {
    if c.is_ascii() {
        c.is_ascii_alphabetic()
    } else {
        c.general_category_group() == GeneralCategoryGroup::Letter
    }
}

fn is_number(c: char) -> bool {
    if c.is_ascii() {
        c.is_ascii_digit()
    } else {
        c.general_category_group() == GeneralCategoryGroup::Number
    }
}

fn is_symbol(c: char) -> bool {
    !c.is_whitespace() && !is_letter(c) && !is_number(c)
}

/// Bytes of the longest run of characters that satisfy `want`.
fn run(text: &str, want: impl Fn(char) -> bool) -> usize {
    text.find(|c| !want(c)).unwrap_or(text.len())
}

/// Bytes of `'s`, `'t`, `'re`, `'ve`, `'m`, `'ll` or `'d` at the start.
fn contraction(text: &str, any_case: bool) -> usize {
    let bytes = text.as_bytes();
    if bytes[0] != b'\'' {
        return 0;
    }
    let at = |i: usize| {
        bytes
            .get(i)
            .map_or(0, |b| if any_case { b.to_ascii_lowercase() } else { *b })
    };
    match (at(1), at(2)) {
        (b's' | b't' | b'm' | b'd', _) => 2,
        (b'r' | b'v', b'e') | (b'l', b'l') => 3,
        _ => 0,
    }
}

/// Bytes of white space at the start: all of it at the end of the text, else all but the last character (which goes with the
/// word behind it), else that one.
fn space(text: &str) -> usize {
    let len = run(text, char::is_whitespace);
    if len == text.len() {
        return len;
    }
    let last = text[..len].chars().next_back().map_or(0, char::len_utf8);
    if len > last { len - last } else { len }
}

/// `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`
fn gpt2(text: &str) -> usize {
    let len = contraction(text, false);
    if len > 0 {
        return len;
    }
    let lead = usize::from(text.starts_with(' '));
    for class in [is_letter, is_number, is_symbol] {
        let len = run(&text[lead..], class);
        if len > 0 {
            return lead + len;
        }
    }
    space(text)
}

/// Digits alone; between them GPT-2's pattern, which must not look beyond the next digit. `plain`: bytes of `text` that are known to
/// hold none, 0 at first; what is taken is taken off.
fn smollm(text: &str, plain: &mut usize) -> usize {
    if *plain == 0 {
        *plain = run(text, |c| !is_number(c));
    }
    if *plain == 0 {
        return text.chars().next().map_or(0, char::len_utf8);
    }
    let len = gpt2(&text[..*plain]);
    *plain -= len;
    len
}

/// `(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,digits}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+`
fn gpt4(text: &str, digits: usize) -> usize {
    let len = contraction(text, true);
    if len > 0 {
        return len;
    }
    let newline = |c| c == '\r' || c == '\n';
    let first = text.chars().next().unwrap_or(' ');
    let lead = if is_letter(first) || is_number(first) || newline(first) {
        0
    } else {
        first.len_utf8()
    };
    let len = run(&text[lead..], is_letter);
    if len > 0 {
        return lead + len;
    }
    if is_number(first) {
        return text
            .chars()
            .take(digits)
            .take_while(|&c| is_number(c))
            .map(char::len_utf8)
            .sum();
    }
    let lead = usize::from(first == ' ');
    let len = run(&text[lead..], is_symbol);
    if len > 0 {
        return lead + len + run(&text[lead + len..], newline);
    }
    let white = run(text, char::is_whitespace);
    match text[..white].rfind(newline) {
        Some(last) => last + 1,
        None => space(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(pre: Pre, text: &str) -> Vec<&str> {
        pre.split(text).collect()
    }

    #[test]
    fn patterns_cut_as_their_regular_expressions_do() {
        assert_eq!(
            cut(Pre::Gpt2, "I'll  go, 123 é!\n\n x"),
            ["I", "'ll", " ", " go", ",", " 123", " é", "!", "\n\n", " x"]
        );
        assert_eq!(cut(Pre::SmolLm, "a 12  b"), ["a", " ", "1", "2", " ", " b"]);
        assert_eq!(
            cut(Pre::Qwen2, "I'LL x=12;\n\n  y \n z  "),
            [
                "I", "'LL", " x", "=", "1", "2", ";\n\n", " ", " y", " \n", " z", "  "
            ]
        );
        assert_eq!(cut(Pre::Llama3, "12345 (foo)"), ["123", "45", " (", "foo", ")"]);
        assert_eq!(cut(Pre::Qwen2, "\tif"), ["\tif"]);
    }

    #[test]
    fn pieces_join_to_the_text_and_long_runs_take_linear_time() {
        for text in ["\u{3000}\u{a0} x\r\n", "'", "''s", "ǅ½ ½", "👩‍👩‍👧 e\u{301}"] {
            for pre in [Pre::Gpt2, Pre::SmolLm, Pre::Qwen2, Pre::Llama3] {
                assert_eq!(cut(pre, text).concat(), text);
            }
        }
        // Anything that looks at the rest of the text for each piece would take hours.
        let long = |parts: &[&str]| {
            parts
                .iter()
                .map(|p| p.repeat((1 << 21) / p.len()))
                .collect::<String>()
        };
        let texts = [
            long(&[" ", "a"]),
            long(&["word "]),
            long(&["1"]),
            long(&["a", "1"]),
            long(&["'s", "x'"]),
            long(&["\n ", "\n"]),
            long(&[" \n.", ".\n "]),
            long(&["½ Ж\u{3000}"]),
        ];
        for pre in [Pre::Gpt2, Pre::SmolLm, Pre::Qwen2, Pre::Llama3] {
            for text in &texts {
                assert_eq!(pre.split(text).map(str::len).sum::<usize>(), text.len());
            }
        }
        assert_eq!(cut(Pre::Qwen2, &texts[0]).len(), 2);
    }
}
