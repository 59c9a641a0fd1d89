//! The KV cache: pages, segments, private tails, radix tree, memory accountant.
