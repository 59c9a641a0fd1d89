//! CPU kernels: quantised matrix products, attention over pages, norms, RoPE, a thread team.
//!
//! The only crate with `unsafe`. Safe outside; every kernel has a scalar twin that is its documentation and its referee.
#![allow(unsafe_code)]

mod amx;
pub mod attend;
pub mod cpu;
pub mod dense;
pub mod grad;
pub mod matmul;
pub mod memory;
pub mod ops;
pub mod probe;
pub mod quant;
pub mod team;
