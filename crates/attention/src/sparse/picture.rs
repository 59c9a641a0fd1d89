//! Plans as pictures: what one head reads, block by block, in numbers and in characters.

use antefix_state::plan::{Cover, Plan, Unit};

use super::Planned;

/// Blocks a side at most; several blocks share a character beyond it.
const WIDEST: usize = 96;

/// What a head reads, in squares of blocks.
#[derive(Debug, Clone, PartialEq)]
pub struct Grid {
    /// Queries, and keys, a square.
    pub side: usize,
    /// One line a block of queries: the share of each block of keys before it that is read, 0 to 1. What the last query of the line reads stands
    /// for it.
    pub lines: Vec<Vec<f64>>,
}

/// What query head `head` reads of `layer`; `None` if nothing was planned there. `group` query heads share keys.
pub fn grid(plans: &[Planned], layer: usize, head: usize, group: usize) -> Option<Grid> {
    let mine: Vec<&Planned> = plans.iter().filter(|p| p.layer == layer).collect();
    let n = mine.iter().map(|p| p.queries.end).max()? as usize;
    let cover = |plan: &Plan| match plan.unit {
        Unit::QueryHead => plan.units.get(head).cloned(),
        Unit::KvGroup => plan.units.get(head / group).cloned(),
    };
    let block = mine.iter().find_map(|p| match cover(&p.plan)? {
        Cover::Dense => None,
        Cover::Sparse(rows) => Some(rows.block as usize),
    });
    let mut side = block.unwrap_or(64).max(16);
    while n.div_ceil(side) > WIDEST {
        side *= 2;
    }
    let line = |line: usize| -> Vec<f64> {
        let last = ((line + 1) * side).min(n) - 1;
        let planned = mine.iter().find(|p| p.queries.contains(&(last as u32)));
        let runs: Vec<(usize, usize)> = match planned.and_then(|p| cover(&p.plan)) {
            Some(Cover::Sparse(rows)) => {
                let runs = rows.runs(last / rows.block as usize - rows.first_block as usize);
                runs.map(|(start, end)| (start as usize, end as usize)).collect()
            }
            _ => vec![(0, last + 1)],
        };
        let share = |cell: usize| {
            let (from, to) = (cell * side, (cell + 1) * side);
            let kept = runs
                .iter()
                .map(|&(start, end)| end.min(to).saturating_sub(start.max(from)));
            kept.sum::<usize>() as f64 / side as f64
        };
        (0..line).map(share).collect()
    };
    Some(Grid {
        side,
        lines: (0..n.div_ceil(side)).map(line).collect(),
    })
}

/// The same, one line a block of queries and one character a block of keys: `#` all of it, `:` some, `.` nothing, `/` the diagonal.
pub fn picture(plans: &[Planned], layer: usize, head: usize, group: usize) -> String {
    let mut out = String::new();
    for line in grid(plans, layer, head, group)
        .into_iter()
        .flat_map(|grid| grid.lines)
    {
        out.extend(line.into_iter().map(|share| match share {
            0.0 => '.',
            1.0 => '#',
            _ => ':',
        }));
        out.push_str("/\n");
    }
    out
}
