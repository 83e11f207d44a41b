//! Memory for results.

use half::{bf16, f16};

/// Numbers of which every pattern of bits is one.
pub trait Bits: Copy {}

impl Bits for f16 {}
impl Bits for bf16 {}
impl Bits for f32 {}
impl Bits for f64 {}

/// Room for so many numbers of any content, for an engine to overwrite all of them.
#[allow(clippy::uninit_vec)]
pub fn room<X: Bits>(len: usize) -> Vec<X> {
    let mut room = Vec::with_capacity(len);
    // SAFETY: there is room for them, every pattern of bits is a number, and nobody reads one before an engine has written them all;
    // after one that fails, nobody does.
    unsafe { room.set_len(len) };
    room
}
