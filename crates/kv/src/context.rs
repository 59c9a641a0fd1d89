//! What a sequence attends besides its own tail: references to shared segments, in groups.

use std::sync::Arc;

use antefix_state::PAGE_ROWS;

use crate::pool::Pool;
use crate::segment::Segment;

/// Which rows of a segment a query sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Rule {
    /// Those up to its own position, inside the layer's window.
    #[default]
    ByPosition,
    /// All: rows that stand nowhere, such as a learned prefix.
    AllVisible,
}

/// Rows of a segment that one reader does not see, layer by layer: others took their place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hidden {
    /// `[layer][page]`; bit `i` set: row `i` of the page is hidden, in every head.
    layers: Vec<Vec<u32>>,
}

impl Hidden {
    /// Nothing hidden in any of `layers` layers.
    pub fn none(layers: usize) -> Self {
        Self {
            layers: vec![Vec::new(); layers],
        }
    }

    /// Hides row `row` of `layer`.
    ///
    /// # Panics
    /// When there is no such layer.
    pub fn hide(&mut self, layer: usize, row: usize) {
        let words = &mut self.layers[layer];
        words.resize(words.len().max(row / PAGE_ROWS + 1), 0);
        words[row / PAGE_ROWS] |= 1 << (row % PAGE_ROWS);
    }

    /// The rows of page `page` that stay visible, a bit each.
    pub fn open(&self, layer: usize, page: usize) -> u32 {
        !self.layers[layer].get(page).copied().unwrap_or(0)
    }

    /// Hidden rows of a layer.
    pub fn count(&self, layer: usize) -> usize {
        self.layers[layer].iter().map(|w| w.count_ones() as usize).sum()
    }
}

/// A segment as one sequence sees it.
///
/// A row at `p` in the segment's frame stands at `p + delta` for this sequence. Since rotations compose, a query at `q` reads it
/// in place after being rotated by `-delta`: one physical segment serves any number of readers at any offsets.
#[derive(Debug, Clone)]
pub struct SegRef {
    /// The rows.
    pub segment: Arc<Segment>,
    /// From the segment's frame to the sequence's positions.
    pub delta: i32,
    /// Which rows a query sees.
    pub rule: Rule,
    /// Rows that it does not see although the rule allows it.
    pub hidden: Option<Arc<Hidden>>,
}

impl SegRef {
    /// All rows of `segment` at their own positions, seen causally.
    pub fn new(segment: Arc<Segment>) -> Self {
        Self::at(segment, 0)
    }

    /// All rows of `segment`, moved by `delta`, seen causally.
    pub fn at(segment: Arc<Segment>, delta: i32) -> Self {
        Self {
            segment,
            delta,
            rule: Rule::ByPosition,
            hidden: None,
        }
    }
}

/// References whose rows are attended together, under one temperature and one power.
///
/// With `s` the scores of the group's rows, the group enters the merge with output `softmax(s / temperature) v` and log-sum-exp
/// `lse_scale * lse(s / temperature)`. The power is applied once, to the whole group.
#[derive(Debug, Clone)]
pub struct Group {
    /// Divides the scores; positive.
    pub temperature: f32,
    /// Multiplies the group's log-sum-exp; positive.
    pub lse_scale: f32,
    /// The segments, in the order in which they are folded.
    pub refs: Vec<SegRef>,
}

impl Group {
    /// A group that changes nothing: its rows count as if they were the sequence's own.
    pub fn plain(refs: Vec<SegRef>) -> Self {
        Self {
            temperature: 1.0,
            lse_scale: 1.0,
            refs,
        }
    }

    /// Whether its rows count as if they were the sequence's own.
    pub fn is_plain(&self) -> bool {
        self.temperature == 1.0 && self.lse_scale == 1.0
    }
}

/// Everything a sequence attends besides its own tail.
#[derive(Debug, Clone, Default)]
pub struct Context {
    /// Folded in this order, before the tail.
    pub groups: Vec<Group>,
}

impl Context {
    /// Whether there is nothing to attend.
    pub fn is_empty(&self) -> bool {
        self.groups.iter().all(|g| g.refs.is_empty())
    }

    /// All references, in order.
    pub fn refs(&self) -> impl Iterator<Item = &SegRef> {
        self.groups.iter().flat_map(|g| &g.refs)
    }

    /// Pages that it holds, shared ones included; a segment that is referred to twice counts once.
    pub fn page_count(&self) -> usize {
        let mut segments: Vec<&Arc<Segment>> = Vec::new();
        for r in self.refs() {
            if !segments.iter().any(|s| Arc::ptr_eq(s, &r.segment)) {
                segments.push(&r.segment);
            }
        }
        segments.into_iter().map(|s| s.page_count()).sum()
    }

    /// Gives its handles back.
    pub fn release(self, pool: &mut Pool) {
        for r in self.groups.into_iter().flat_map(|g| g.refs) {
            r.segment.release(pool);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hidden_rows_are_counted_and_masked_by_page() {
        let mut hidden = Hidden::none(2);
        hidden.hide(1, 0);
        hidden.hide(1, 33);
        assert_eq!((hidden.open(1, 0), hidden.open(1, 1)), (!1, !2));
        assert_eq!(hidden.open(1, 7), u32::MAX, "beyond the list nothing is hidden");
        assert_eq!(hidden.open(0, 0), u32::MAX);
        assert_eq!((hidden.count(0), hidden.count(1)), (0, 2));
    }
}
