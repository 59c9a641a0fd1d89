//! The one function through which every layer attends, and the seams that methods hang on.
