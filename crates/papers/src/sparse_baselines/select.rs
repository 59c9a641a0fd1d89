//! Choosing by score.

/// Indices of the `count` largest scores, in no order; of equals the lower ones.
pub fn best(scores: &[f32], count: usize) -> Vec<u32> {
    let mut order: Vec<u32> = (0..scores.len() as u32).collect();
    if count == 0 {
        return Vec::new();
    }
    if count < order.len() {
        let first = |&a: &u32, &b: &u32| scores[b as usize].total_cmp(&scores[a as usize]).then(a.cmp(&b));
        order.select_nth_unstable_by(count - 1, first);
        order.truncate(count);
    }
    order
}
