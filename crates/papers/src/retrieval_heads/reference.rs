//! The scores as the papers define them, out of whole attention rows, in f64.

/// Classic score of one head (section 2.2): `rows[t]` is its attention row while `output[t]` was drawn, `span` the answer's tokens.
pub fn retrieval(rows: &[Vec<f64>], prompt: &[u32], span: std::ops::Range<usize>, output: &[u32]) -> f64 {
    let mut score = 0.0;
    for (row, &y) in rows.iter().zip(output) {
        let mut best = 0;
        for (j, &a) in row.iter().enumerate() {
            if a > row[best] {
                best = j;
            }
        }
        if span.contains(&best) && prompt[best] == y {
            score += 1.0 / span.len() as f64;
        }
    }
    score
}

/// Score of semantic retrieval heads (paper `compresskv`, section 3.1): for every place of the span that holds the drawn token, the mass
/// on the whole span.
pub fn semantic(rows: &[Vec<f64>], prompt: &[u32], span: std::ops::Range<usize>, output: &[u32]) -> f64 {
    let mut score = 0.0;
    for (row, &y) in rows.iter().zip(output) {
        for i in span.clone() {
            if prompt[i] == y {
                score += span.clone().map(|j| row[j]).sum::<f64>();
            }
        }
    }
    score
}
