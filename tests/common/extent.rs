//! How much is tested.

use std::env::{self, VarError};
use std::io::Write;
use std::sync::OnceLock;

/// Whether every case runs, on every seed and under every sanitizer: `ATTN_TESTS=all`. Without it, the few of each list
/// that name every kernel and every choice, on two seeds.
pub fn is_all() -> bool {
    static ALL: OnceLock<bool> = OnceLock::new();
    *ALL.get_or_init(|| match env::var("ATTN_TESTS").as_deref() {
        Err(VarError::NotPresent) => false,
        Ok("all") => true,
        other => panic!("ATTN_TESTS is {other:?}; it is `all`, or not set"),
    })
}

/// Whether a test that only `ATTN_TESTS=all` has is left out, which it then says.
pub fn leaves_out(what: &str) -> bool {
    if !is_all() {
        let _ = writeln!(std::io::stderr(), "left to ATTN_TESTS=all: {what}");
    }
    !is_all()
}

/// Two of the seeds if not everything is tested: one with early copies, one with late ones, out of order if there are more.
pub fn seeds(all: &'static [u32]) -> &'static [u32] {
    if is_all() || all.len() <= 2 { all } else { &all[all.len() / 2 - 1..][..2] }
}

/// Every second of `all` if not everything is tested, for odd numbers the others; one alone always.
pub fn every_second<T: Copy>(all: &[T], number: usize) -> Vec<T> {
    let has_its_turn = |place: usize| is_all() || all.len() == 1 || place % 2 == number % 2;
    all.iter().enumerate().filter(|&(place, _)| has_its_turn(place)).map(|(_, &one)| one).collect()
}
