//! Knobs that planners share.

use antefix_attention::method::{Dial, Kind, Knob, Knobs, Preset, Unit};

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

/// Blocks of keys that a block of queries reads.
pub const KEEP: Knob = Knob {
    name: "keep",
    kind: Kind::int(2, 1 << 20),
    default: Preset::Int(24),
    unit: "blocks",
    help: "Blocks of keys that a block of queries reads, the first and its own among them",
    source: "ours",
};

/// For whom a plan is made.
pub const fn unit(default: &'static str, help: &'static str, source: &'static str) -> Knob {
    Knob {
        name: "unit",
        kind: Kind::Choice(&["kv_group", "query_head"]),
        default: Preset::Text(default),
        unit: "",
        help,
        source,
    }
}

/// The value of [`unit()`].
pub fn unit_of(knobs: &Knobs) -> Unit {
    match knobs.text("unit") {
        "query_head" => Unit::QueryHead,
        _ => Unit::KvGroup,
    }
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

/// Share of the keys that a drawn token reads.
pub const fn drawn_share(source: &'static str) -> Knob {
    share(
        0.0625,
        "Share of the keys that a drawn token reads in a sparse layer",
        source,
    )
}

/// Share of the keys that are read.
pub const fn share(default: f64, help: &'static str, source: &'static str) -> Knob {
    Knob {
        name: "share",
        kind: Kind::above(0.0, 1.0),
        default: Preset::Float(default),
        unit: "",
        help,
        source,
    }
}

/// Values of [`drawn_share`] that are worth trying.
pub const SHARES: &[Dial] = &[Dial {
    knob: "share",
    from: 0.01,
    to: 0.5,
}];

/// Values of [`share`] and [`least`] that are worth trying for prompts.
pub const BUDGETS: &[Dial] = &[
    Dial {
        knob: "share",
        from: 0.02,
        to: 0.6,
    },
    Dial {
        knob: "least",
        from: 64.0,
        to: 2048.0,
    },
];

/// Numbers of blocks that are worth trying, of a knob `keep`.
pub const KEPT_BLOCKS: &[Dial] = &[Dial {
    knob: "keep",
    from: 4.0,
    to: 256.0,
}];

/// Last rows of a stretch that are attended in full.
pub const fn last_rows(source: &'static str) -> Knob {
    Knob {
        name: "rows",
        kind: Kind::int(1, 512),
        default: Preset::Int(64),
        unit: "rows",
        help: "Last rows of a stretch that are attended in full to plan it",
        source,
    }
}

/// Keys that are read at least.
pub const fn least(default: i64, source: &'static str) -> Knob {
    Knob {
        name: "least",
        kind: Kind::int(1, 1 << 20),
        default: Preset::Int(default),
        unit: "keys",
        help: "Keys that are read at least; texts of no more are dense",
        source,
    }
}

/// First layers that read everything.
pub const fn dense_layers(default: i64, source: &'static str) -> Knob {
    Knob {
        name: "dense_layers",
        kind: Kind::int(0, 1024),
        default: Preset::Int(default),
        unit: "layers",
        help: "First layers that are dense",
        source,
    }
}

/// How many keys are read.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Budget {
    /// [`share`].
    pub share: f64,
    /// [`least`].
    pub least: usize,
}

impl Budget {
    /// The values of the knobs.
    pub fn of(knobs: &Knobs) -> Self {
        Self {
            share: knobs.float("share"),
            least: knobs.size("least"),
        }
    }

    /// Of `keys` keys; `None`: all of them.
    pub fn keys(&self, keys: usize) -> Option<usize> {
        let budget = self.least.max((self.share * keys as f64).ceil() as usize);
        (budget < keys).then_some(budget)
    }
}
