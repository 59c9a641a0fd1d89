//! Jobs, sequences, batches: the scheduler, the sampler and the loop that runs a model.
