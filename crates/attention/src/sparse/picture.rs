//! Plans as pictures of characters.

use antefix_state::plan::{Cover, Plan, Unit};

use super::Planned;

/// Blocks a side at most; several blocks share a character beyond it.
const WIDEST: usize = 96;

/// What query head `head` reads of `layer`, one line a block of queries and one character a block of keys: `#` all of it, `:` some, `.`
/// nothing, `/` the diagonal. `group` query heads share keys.
pub fn picture(plans: &[Planned], layer: usize, head: usize, group: usize) -> String {
    let mine: Vec<&Planned> = plans.iter().filter(|p| p.layer == layer).collect();
    let Some(n) = mine.iter().map(|p| p.queries.end).max() else {
        return String::new();
    };
    let cover = |plan: &Plan| match plan.unit {
        Unit::QueryHead => plan.units.get(head).cloned(),
        Unit::KvGroup => plan.units.get(head / group).cloned(),
    };
    let block = mine.iter().find_map(|p| match cover(&p.plan)? {
        Cover::Dense => None,
        Cover::Sparse(rows) => Some(rows.block as usize),
    });
    let (n, mut side) = (n as usize, block.unwrap_or(64).max(16));
    while n.div_ceil(side) > WIDEST {
        side *= 2;
    }
    let mut out = String::new();
    for line in 0..n.div_ceil(side) {
        let last = ((line + 1) * side).min(n) - 1;
        // What the last query of the line reads stands for it.
        let planned = mine.iter().find(|p| p.queries.contains(&(last as u32)));
        let runs: Vec<(usize, usize)> = match planned.and_then(|p| cover(&p.plan)) {
            Some(Cover::Sparse(rows)) => {
                let runs = rows.runs(last / rows.block as usize - rows.first_block as usize);
                runs.map(|(start, end)| (start as usize, end as usize)).collect()
            }
            _ => vec![(0, last + 1)],
        };
        for cell in 0..line {
            let (from, to) = (cell * side, (cell + 1) * side);
            let kept: usize = runs
                .iter()
                .map(|&(start, end)| end.min(to).saturating_sub(start.max(from)))
                .sum();
            out.push(match kept {
                0 => '.',
                kept if kept == side => '#',
                _ => ':',
            });
        }
        out.push_str("/\n");
    }
    out
}
