//! Rows of a table by token.

use std::sync::Arc;

use antefix_kernels::grad;
use candle_core::{Result, Tensor};

use super::node::{Arg, Op, Output, Scalar, apply, ensure};

/// `[R, d]`: row `tokens[r]` of `table: [V, d]`, times `scale`. The gradient is summed in the order of the tokens.
///
/// # Errors
/// When a token is not in the table.
pub fn embed(table: &Tensor, tokens: &Arc<Vec<u32>>, scale: f64) -> Result<Tensor> {
    apply(
        Embed {
            tokens: tokens.clone(),
            scale,
        },
        &[table],
    )
}

struct Embed {
    tokens: Arc<Vec<u32>>,
    scale: f64,
}

impl Op for Embed {
    type Saved<T: Scalar> = ();

    const NAME: &'static str = "embedding";

    fn forward<T: Scalar>(&self, args: &[Arg<'_, T>]) -> Result<Output<T, ()>> {
        let [vocab, d] = args[0].matrix();
        let mut data = Vec::with_capacity(self.tokens.len() * d);
        for &token in self.tokens.iter() {
            ensure((token as usize) < vocab, || {
                format!("token {token} is not one of the model's {vocab}")
            })?;
            let row = &args[0].data[token as usize * d..][..d];
            data.extend(row.iter().map(|&x| x * T::of(self.scale)));
        }
        Ok(Output {
            data,
            dims: vec![self.tokens.len(), d],
            saved: (),
        })
    }

    fn backward<T: Scalar>(
        &self,
        args: &[Arg<'_, T>],
        _: &[bool],
        (): &(),
        _: &[T],
        grad: &[T],
    ) -> Result<Vec<Option<Vec<T>>>> {
        let [_, d] = args[0].matrix();
        let mut dtable = vec![T::zero(); args[0].data.len()];
        for (&token, row) in self.tokens.iter().zip(grad.chunks_exact(d)) {
            grad::add_scaled(&mut dtable[token as usize * d..][..d], T::of(self.scale), row);
        }
        Ok(vec![Some(dtable)])
    }
}
