//! Knobs that planners share.

use antefix_attention::method::{Kind, Knob, Knobs, Preset};

/// Rows of a block of queries, and keys of a block of keys: whole pages.
pub const fn block(default: &'static str, source: &'static str) -> Knob {
    Knob {
        name: "block",
        kind: Kind::Choice(&["32", "64", "128", "256"]),
        default: Preset::Text(default),
        unit: "rows",
        help: "Rows of a block: queries that share one list of keys, and keys that are taken together",
        source,
    }
}

/// The value of [`block`].
pub fn block_rows(knobs: &Knobs) -> usize {
    knobs
        .text("block")
        .parse()
        .expect("one of the choices is a number")
}

/// Blocks that are planned together.
pub const fn chunk(default: i64) -> Knob {
    Knob {
        name: "chunk",
        kind: Kind::int(1, 64),
        default: Preset::Int(default),
        unit: "blocks",
        help: "Blocks that are planned together; a step computes whole chunks of a prompt, so large ones keep those beside it waiting",
        source: "ours",
    }
}

/// First keys that every row reads.
pub const fn sinks(default: i64, source: &'static str) -> Knob {
    Knob {
        name: "sinks",
        kind: Kind::int(0, 1 << 20),
        default: Preset::Int(default),
        unit: "keys",
        help: "First keys that every row reads",
        source,
    }
}
