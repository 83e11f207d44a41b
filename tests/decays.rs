//! Decays that leave nothing, tokens that are not there, and the gradient of the log-decay over long sequences.
