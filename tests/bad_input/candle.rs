//! The table on candle tensors.

#[test]
fn refused() {}
