//! Potential games: rounding, market, best response, flock graphs, equilibrium certificates.
