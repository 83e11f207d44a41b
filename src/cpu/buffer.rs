//! Scratch memory: it starts on a cache line, and stays with the thread that is done with it.
//!
//! A buffer that is dropped goes to a shelf of the thread it is dropped on, where the next one of that thread is taken from: a call
//! like the one before allocates nothing but its results.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut};

/// Bytes of a cache line, and of the longest vector.
const LINE: usize = 64;
/// Most bytes of numbers of one type that a thread keeps between calls.
const KEPT_BYTES: usize = 16 << 20;
/// Most buffers of one type that a thread keeps: each is looked at when one is wanted.
const KEPT: usize = 64;
/// Numbers by which a kept buffer may be longer than one of half its length, so that short ones are not left to longer ones.
const SPARE: usize = 4096;

/// The memory of one type that a thread keeps, the oldest first.
pub struct Shelf<X> {
    kept: Vec<Vec<X>>,
    bytes: usize,
}

impl<X: Copy + Default> Shelf<X> {
    const fn new() -> Self {
        Self { kept: Vec::new(), bytes: 0 }
    }

    /// The shortest of the kept ones that is long enough, and not much too long.
    fn take(&mut self, len: usize) -> Option<Vec<X>> {
        let fits = |kept: &Vec<X>| (len..=2 * len + SPARE).contains(&kept.len());
        let fitting = self.kept.iter().enumerate().filter(|(_, kept)| fits(kept));
        let (index, _) = fitting.min_by_key(|(_, kept)| kept.len())?;
        let data = self.kept.remove(index);
        self.bytes -= size_of_val(&data[..]);
        Some(data)
    }

    fn put(&mut self, data: Vec<X>) {
        self.bytes += size_of_val(&data[..]);
        self.kept.push(data);
        while self.bytes > KEPT_BYTES || self.kept.len() > KEPT {
            self.bytes -= size_of_val(&self.kept.remove(0)[..]);
        }
    }
}

/// Types of numbers that threads keep memory of.
pub trait Kept: Copy + Default + 'static {
    /// Acts on the shelf of this thread; `None` where the thread is about to end and has none any more.
    fn on_shelf<R>(act: impl FnOnce(&mut Shelf<Self>) -> R) -> Option<R>;
}

macro_rules! kept {
    ($($x:ty),*) => {
        $(
            impl Kept for $x {
                fn on_shelf<R>(act: impl FnOnce(&mut Shelf<Self>) -> R) -> Option<R> {
                    thread_local! {
                        static SHELF: RefCell<Shelf<$x>> = const { RefCell::new(Shelf::new()) };
                    }
                    SHELF.try_with(|shelf| act(&mut shelf.borrow_mut())).ok()
                }
            }
        )*

        /// Frees what this thread keeps.
        fn release() {
            $( <$x>::on_shelf(|shelf| *shelf = Shelf::new()); )*
        }
    };
}
kept!(f32, f64, u32);

/// Frees the scratch memory that the threads of the current rayon pool and the calling thread keep.
///
/// Calls leave their scratch memory to the threads that worked on them, for the next call: up to 16 MiB of f32 and as much of f64
/// for each thread, in fact what its tasks needed. It is freed when a thread ends; in programs that make no further calls for
/// long, this function frees it before.
///
/// # Example
/// ```
/// use attn_kernels::{SoftmaxOptions, cpu, problem::View};
///
/// let x: Vec<f32> = (0..100 * 8).map(|i| (i as f32).sin()).collect();
/// let x = View::contiguous(&x[..], &[1, 1, 100, 8])?;
/// let out = cpu::softmax::<f32>(x, x, x, &SoftmaxOptions::default())?.out;
/// cpu::release_scratch();
/// assert_eq!(cpu::softmax::<f32>(x, x, x, &SoftmaxOptions::default())?.out, out);
/// # Ok::<(), attn_kernels::Error>(())
/// ```
pub fn release_scratch() {
    release();
    rayon::broadcast(|_| release());
}

/// A fixed number of elements, the first on a cache line, so that no vector of a tile lies across two lines.
pub struct Buffer<X> {
    data: Vec<X>,
    start: usize,
    len: usize,
    /// Of `X`, known where the buffer was made.
    give_back: fn(Vec<X>),
}

impl<X: Kept> Buffer<X> {
    /// Elements of any content, for whoever overwrites all that is read.
    pub fn room(len: usize) -> Self {
        Self::new(len, false)
    }

    pub fn zeros(len: usize) -> Self {
        Self::new(len, true)
    }

    fn new(len: usize, clear: bool) -> Self {
        let give_back = |data| {
            X::on_shelf(|shelf| shelf.put(data));
        };
        if len == 0 {
            return Self { data: Vec::new(), start: 0, len, give_back };
        }
        let spare = LINE / size_of::<X>();
        let kept = X::on_shelf(|shelf| shelf.take(len + spare)).flatten();
        let is_new = kept.is_none();
        let data = kept.unwrap_or_else(|| vec![X::default(); len + spare]);
        // An offset of `usize::MAX` means that there is none.
        let start = data.as_ptr().align_offset(LINE).min(spare);
        let mut buffer = Self { data, start, len, give_back };
        if clear && !is_new {
            buffer.fill(X::default());
        }
        buffer
    }
}

impl<X> Drop for Buffer<X> {
    fn drop(&mut self) {
        if !self.data.is_empty() {
            (self.give_back)(std::mem::take(&mut self.data));
        }
    }
}

impl<X> Deref for Buffer<X> {
    type Target = [X];

    fn deref(&self) -> &[X] {
        &self.data[self.start..self.start + self.len]
    }
}

impl<X> DerefMut for Buffer<X> {
    fn deref_mut(&mut self) -> &mut [X] {
        &mut self.data[self.start..self.start + self.len]
    }
}

impl<X: Kept> Clone for Buffer<X> {
    fn clone(&self) -> Self {
        let mut clone = Self::room(self.len);
        clone.copy_from_slice(self);
        clone
    }

    fn clone_from(&mut self, source: &Self) {
        if self.len == source.len {
            self.copy_from_slice(source);
        } else {
            *self = source.clone();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a thread of its own keeps of f32 after `act`.
    fn kept_after(act: impl FnOnce() + Send) -> (usize, usize) {
        std::thread::scope(|scope| {
            let count = || f32::on_shelf(|shelf| (shelf.kept.len(), shelf.bytes)).expect("a shelf");
            let run = move || {
                act();
                count()
            };
            scope.spawn(run).join().expect("no panic")
        })
    }

    #[test]
    fn memory_is_used_again() {
        let act = || {
            let first = Buffer::<f32>::room(1000);
            let at = first.as_ptr();
            drop(first);
            assert_eq!(Buffer::<f32>::room(900).as_ptr(), at);
            // Too short, and much too long.
            assert!(Buffer::<f32>::room(1200).as_ptr() != at);
            drop(Buffer::<f32>::room(100_000));
            assert!(Buffer::<f32>::room(10).len() == 10);
        };
        assert_eq!(kept_after(act).0, 3);
    }

    #[test]
    fn zeros_are_zeros() {
        kept_after(|| {
            Buffer::<f32>::room(1000).fill(f32::NAN);
            assert!(Buffer::<f32>::zeros(1000).iter().all(|&x| x == 0.0));
        });
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let many = || drop((0..2 * KEPT).map(|_| Buffer::<f32>::room(10)).collect::<Vec<_>>());
        assert_eq!(kept_after(many).0, KEPT);
        let long = || drop([6 << 18, 5 << 18, 7 << 18].map(Buffer::<f32>::room));
        let (_, bytes) = kept_after(long);
        assert!(0 < bytes && bytes <= KEPT_BYTES, "{bytes}");
        let longest = || drop(Buffer::<f32>::room(KEPT_BYTES));
        assert_eq!(kept_after(longest), (0, 0));
        let released = || {
            drop(Buffer::<f32>::room(10));
            release_scratch();
        };
        assert_eq!(kept_after(released), (0, 0));
    }
}
