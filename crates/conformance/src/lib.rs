//! Case generators, comparisons and the suite that every method must pass.
