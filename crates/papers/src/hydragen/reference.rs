//! The paper's algorithm, plainly, in f64: one head, rows one after the other.

/// Attention over one part of the keys: the normalised output `o: [D]` and the natural logarithm of the sum of exponentials.
///
/// No keys: `o = 0`, `lse = -inf`.
#[derive(Debug, Clone, PartialEq)]
pub struct Part {
    /// Output, `[D]`.
    pub o: Vec<f64>,
    /// `ln sum exp(s)`.
    pub lse: f64,
}

/// Keys and values of one segment, `[T][D]` each.
#[derive(Debug, Clone, Default)]
pub struct Segment {
    /// Keys.
    pub k: Vec<Vec<f64>>,
    /// Values.
    pub v: Vec<Vec<f64>>,
}

/// A segment and those that follow it. A vertex without children is the end of one sequence.
#[derive(Debug, Clone, Default)]
pub struct Vertex {
    /// Its own keys and values.
    pub segment: Segment,
    /// What may follow.
    pub children: Vec<Vertex>,
}

impl Vertex {
    /// Sequences that pass through it.
    pub fn rows(&self) -> usize {
        self.children.iter().map(Vertex::rows).sum::<usize>().max(1)
    }
}

/// Softmax attention of one scaled query `q: [D]` over a segment.
pub fn attend(q: &[f64], segment: &Segment) -> Part {
    let s: Vec<f64> = segment
        .k
        .iter()
        .map(|k| q.iter().zip(k).map(|(q, k)| q * k).sum())
        .collect();
    let m = s.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let mut o = vec![0.0; q.len()];
    if s.is_empty() {
        return Part { o, lse: m };
    }
    let l: f64 = s.iter().map(|s| (s - m).exp()).sum();
    for (s, v) in s.iter().zip(&segment.v) {
        for (o, v) in o.iter_mut().zip(v) {
            *o += (s - m).exp() / l * v;
        }
    }
    Part { o, lse: m + l.ln() }
}

// Step 1 (3.1)
/// Attention over the keys of all parts together.
pub fn combine(parts: &[Part]) -> Part {
    let dim = parts.first().map_or(0, |p| p.o.len());
    let m = parts.iter().map(|p| p.lse).fold(f64::NEG_INFINITY, f64::max);
    let mut o = vec![0.0; dim];
    if m == f64::NEG_INFINITY {
        return Part { o, lse: m };
    }
    let sum: f64 = parts.iter().map(|p| (p.lse - m).exp()).sum();
    for part in parts {
        for (o, x) in o.iter_mut().zip(&part.o) {
            *o += (part.lse - m).exp() / sum * x;
        }
    }
    Part { o, lse: m + sum.ln() }
}

// Steps 2 and 3 (3.2, 3.3)
/// Attention of the rows `q: [R][D]` that end below `vertex`, in depth-first order.
///
/// # Panics
/// When there is not one query for each sequence.
pub fn decode(vertex: &Vertex, q: &[Vec<f64>]) -> Vec<Part> {
    assert_eq!(q.len(), vertex.rows(), "a query for each sequence");
    let here: Vec<Part> = q.iter().map(|q| attend(q, &vertex.segment)).collect();
    let mut below = Vec::new();
    let mut rest = q;
    for child in &vertex.children {
        let (rows, after) = rest.split_at(child.rows());
        below.extend(decode(child, rows));
        rest = after;
    }
    if below.is_empty() {
        return here;
    }
    here.into_iter()
        .zip(below)
        .map(|(a, b)| combine(&[a, b]))
        .collect()
}
