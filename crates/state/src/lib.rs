//! The algebra of partial attention: states that merge, lanes, plans, ids. No dependencies.
