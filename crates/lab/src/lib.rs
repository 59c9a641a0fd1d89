//! Measurements: bench runner, perplexity, logits, reports.
