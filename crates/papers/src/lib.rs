//! One folder per paper, and the list of them all.
