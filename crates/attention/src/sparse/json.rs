//! Plans as JSON: one object a layer and stretch, printed and read back.
//!
//! ```text
//! {"layer":3,"queries":[0,640],"unit":"kv_group","density":0.18,"units":[{"u":0,"cover":"sparse","block":64,"first_block":0,
//!  "rows":[{"b":0,"segs":[["span",0,64,"causal"]]},{"b":9,"segs":[["span",0,64],["gather",[130,197]],["span",512,640,"causal"]]}]}]}
//! ```

use antefix_state::plan::{Cover, Edge, Plan, PlanError, Rows, Scope, Seg, Unit};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::Planned;

/// Positions in a plan that somebody wrote lie below this.
const LIMIT: u32 = 1 << 30;

/// Why a text is no plan.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PlanTextError {
    /// It is no such object.
    #[error("not a plan: {0}")]
    Form(#[from] serde_json::Error),
    /// A segment that is none.
    #[error(
        "`{0}` is no segment\nhint: [\"span\",START,END], [\"span\",START,END,\"causal\"] or [\"gather\",[KEY,...]]"
    )]
    Segment(Value),
    /// Numbers beyond what a plan can hold.
    #[error("the queries {0} to {1} are no range of positions")]
    Queries(u32, u32),
    /// Units or blocks that are not counted from the first on, each once.
    #[error("{what} {got} stands where {want} belongs")]
    Order {
        /// `unit` or `block`.
        what: &'static str,
        /// Its number.
        got: u64,
        /// The number that belongs there.
        want: u64,
    },
    /// A rule that it breaks.
    #[error("the plan of layer {layer}: {error}")]
    Rule {
        /// The layer.
        layer: usize,
        /// The rule, and where.
        error: PlanError,
    },
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Text {
    layer: usize,
    queries: (u32, u32),
    unit: Kind,
    #[serde(default)]
    density: f64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    recall: Option<f64>,
    units: Vec<UnitText>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Kind {
    QueryHead,
    KvGroup,
}

#[derive(Serialize, Deserialize)]
#[serde(tag = "cover", rename_all = "snake_case", deny_unknown_fields)]
enum UnitText {
    Dense {
        u: usize,
    },
    Sparse {
        u: usize,
        block: u32,
        first_block: u32,
        rows: Vec<RowText>,
    },
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RowText {
    b: u32,
    segs: Vec<Value>,
}

/// One object.
pub fn print(planned: &Planned) -> String {
    let (queries, plan) = (&planned.queries, &planned.plan);
    let unit = |(u, cover): (usize, &Cover)| match cover {
        Cover::Dense => UnitText::Dense { u },
        Cover::Sparse(rows) => UnitText::Sparse {
            u,
            block: rows.block,
            first_block: rows.first_block,
            rows: (0..rows.blocks())
                .map(|i| RowText {
                    b: rows.first_block + i as u32,
                    segs: rows.segs_of(i).iter().map(|seg| print_seg(rows, seg)).collect(),
                })
                .collect(),
        },
    };
    let text = Text {
        layer: planned.layer,
        queries: (queries.start, queries.end),
        unit: match plan.unit {
            Unit::QueryHead => Kind::QueryHead,
            Unit::KvGroup => Kind::KvGroup,
        },
        density: plan.density(queries.clone()),
        recall: planned.recall,
        units: plan.units.iter().enumerate().map(unit).collect(),
    };
    serde_json::to_string(&text).expect("plain data")
}

fn print_seg(rows: &Rows, seg: &Seg) -> Value {
    match *seg {
        Seg::Span {
            start,
            end,
            edge: Edge::Causal,
        } => json!(["span", start, end, "causal"]),
        Seg::Span { start, end, .. } => json!(["span", start, end]),
        Seg::Gather { at, len } => json!(["gather", &rows.idx[at as usize..(at + len) as usize]]),
    }
}

/// Reads an object back; the plan is valid.
///
/// # Errors
/// When it has another form or breaks a rule of plans.
pub fn parse(text: &str) -> Result<Planned, PlanTextError> {
    let text: Text = serde_json::from_str(text)?;
    let (start, end) = text.queries;
    if start >= end || end > LIMIT {
        return Err(PlanTextError::Queries(start, end));
    }
    let units = text
        .units
        .into_iter()
        .enumerate()
        .map(|(i, unit)| parse_unit(i, unit));
    let units: Result<Vec<Cover>, PlanTextError> = units.collect();
    let plan = Plan {
        unit: match text.unit {
            Kind::QueryHead => Unit::QueryHead,
            Kind::KvGroup => Unit::KvGroup,
        },
        scope: Scope::Causal,
        units: units?,
    };
    let rule = |error| PlanTextError::Rule {
        layer: text.layer,
        error,
    };
    plan.validate(start..end).map_err(rule)?;
    Ok(Planned {
        layer: text.layer,
        queries: start..end,
        plan,
        recall: text.recall,
    })
}

fn parse_unit(i: usize, text: UnitText) -> Result<Cover, PlanTextError> {
    let order = |what, got: u64, want: u64| match got == want {
        true => Ok(()),
        false => Err(PlanTextError::Order { what, got, want }),
    };
    let (UnitText::Dense { u } | UnitText::Sparse { u, .. }) = &text;
    order("unit", *u as u64, i as u64)?;
    let UnitText::Sparse {
        block,
        first_block,
        rows,
        ..
    } = text
    else {
        return Ok(Cover::Dense);
    };
    for (i, row) in (0..).zip(&rows) {
        order("block", u64::from(row.b), u64::from(first_block) + i)?;
    }
    let mut cover = Rows {
        block: block.min(LIMIT),
        first_block,
        offsets: vec![0],
        segs: Vec::new(),
        idx: Vec::new(),
    };
    for seg in rows.iter().flat_map(|row| {
        let ends = row.segs.len();
        row.segs
            .iter()
            .enumerate()
            .map(move |(i, seg)| (seg, i + 1 == ends))
    }) {
        let (seg, ends) = seg;
        let parsed = parse_seg(seg, &mut cover.idx).ok_or_else(|| PlanTextError::Segment(seg.clone()))?;
        cover.segs.push(parsed);
        if ends {
            cover.offsets.push(cover.segs.len() as u32);
        }
    }
    Ok(Cover::Sparse(cover))
}

fn parse_seg(seg: &Value, idx: &mut Vec<u32>) -> Option<Seg> {
    let number = |value: &Value| u32::try_from(value.as_u64()?).ok();
    let seg = seg.as_array()?;
    match (seg.first()?.as_str()?, &seg[1..]) {
        ("span", [start, end, edge @ ..]) => Some(Seg::Span {
            start: number(start)?,
            end: number(end)?,
            edge: match edge {
                [] => Edge::Full,
                [edge] if edge == "causal" => Edge::Causal,
                _ => return None,
            },
        }),
        ("gather", [Value::Array(keys)]) => {
            let at = idx.len() as u32;
            for key in keys {
                idx.push(number(key)?);
            }
            Some(Seg::Gather {
                at,
                len: keys.len() as u32,
            })
        }
        _ => None,
    }
}
