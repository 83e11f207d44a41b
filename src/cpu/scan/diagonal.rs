//! h_t = a_t ⊙ h_{t−1} + b_t.

use std::ops::Range;

use super::super::elementwise::Element;
use super::super::parallel;
use super::columns::{Columns, ranges};

/// Channels of a task.
const WIDTH: usize = 256;

/// Sizes of a scan over `[batch, steps, channels]`.
#[derive(Debug, Clone, Copy)]
pub struct DiagonalScan {
    pub batch: usize,
    pub steps: usize,
    pub channels: usize,
    /// Whether steps are taken from the last to the first.
    pub reversed: bool,
}

impl DiagonalScan {
    fn len(&self) -> usize {
        self.batch * self.steps * self.channels
    }

    /// The step that is taken as the n-th.
    fn step(&self, n: usize) -> usize {
        if self.reversed { self.steps - 1 - n } else { n }
    }

    /// The places of the channels at a step of a batch entry.
    fn row(&self, batch: usize, step: usize, channels: &Range<usize>) -> Range<usize> {
        let start = (batch * self.steps + step) * self.channels;
        start + channels.start..start + channels.end
    }

    /// Batch entries and channels of the tasks, in the order of [`Columns::cut`].
    fn tasks(&self) -> impl Iterator<Item = (usize, Range<usize>)> {
        let channels = self.channels;
        (0..self.batch).flat_map(move |batch| ranges(channels, WIDTH).map(move |channels| (batch, channels)))
    }

    /// The columns of each task, of every part of a number.
    fn columns<'o, T, const P: usize>(&self, all: [&'o mut [T]; P]) -> Vec<[Columns<'o, T>; P]> {
        let mut parts = all.map(|part| Columns::cut(part, self.steps, self.channels, WIDTH).into_iter());
        self.tasks().map(|_| parts.each_mut().map(|part| part.next().expect("a column for each task"))).collect()
    }

    /// About how long it takes on one thread: 10 bytes a nanosecond.
    fn nanoseconds<T>(&self, tensors: usize) -> usize {
        self.len() * tensors * size_of::<T>() / 10
    }
}

/// The first and the second of every pair.
fn unzip<A, B, const P: usize>(pairs: [(A, B); P]) -> ([A; P], [B; P]) {
    let (mut seconds, mut at) = ([const { None }; P], 0);
    let firsts = pairs.map(|(first, second)| {
        seconds[at] = Some(second);
        at += 1;
        first
    });
    (firsts, seconds.map(|second| second.expect("one for each pair")))
}

fn cut<T, const P: usize>(parts: [&[T]; P], at: Range<usize>) -> [&[T]; P] {
    parts.map(|part| &part[at.clone()])
}

/// h of real numbers (P = 1) or of complex ones (P = 2: real, imaginary parts), all `[batch, steps, channels]` and row-major,
/// after `state`, `[batch, channels]` (0 by default), into `h`.
pub fn diagonal_scan<T: Element, const P: usize>(
    scan: DiagonalScan,
    a: [&[T]; P],
    b: [&[T]; P],
    state: Option<[&[T]; P]>,
    h: [&mut [T]; P],
) {
    if scan.len() == 0 {
        return;
    }
    let (verbs, zeros) = (T::verbs(), [T::ZERO; WIDTH]);
    let tasks: Vec<_> = scan.tasks().zip(scan.columns(h)).collect();
    let work = |(): &mut (), ((batch, channels), mut h): ((usize, Range<usize>), [Columns<'_, T>; P])| {
        for n in 0..scan.steps {
            let step = scan.step(n);
            let at = scan.row(batch, step, &channels);
            let (a, b) = (cut(a, at.clone()), cut(b, at));
            if n == 0 {
                let of = batch * scan.channels;
                let first = state.map(|state| cut(state, of + channels.start..of + channels.end));
                let first = first.unwrap_or([&zeros[..channels.len()]; P]);
                verbs.recur(h.each_mut().map(|h| h.row(step)), a, first, b, false);
                continue;
            }
            let (before, into) = unzip(h.each_mut().map(|h| h.pair(scan.step(n - 1), step)));
            verbs.recur(into, a, before, b, false);
        }
    };
    parallel::run_brief(scan.nanoseconds::<T>(3 * P), tasks, || (), work);
}

/// Gradients of a and b for [`diagonal_scan`], given h and its own, into `rooms`; that of the state is a* times that of b at the first step
/// taken, with a* the conjugate of a.
///
/// ```text
/// db_t = dh_t + a*_{t+1} ⊙ db_{t+1},   da_t = h*_{t−1} ⊙ db_t
/// ```
pub fn diagonal_scan_backward<T: Element, const P: usize>(
    scan: DiagonalScan,
    a: [&[T]; P],
    state: Option<[&[T]; P]>,
    h: [&[T]; P],
    d_h: [&[T]; P],
    [d_a, d_b]: [[&mut [T]; P]; 2],
) {
    if scan.len() == 0 {
        return;
    }
    let (verbs, nothing) = (T::verbs(), [T::ZERO; WIDTH]);
    let rooms = scan.columns(d_a).into_iter().zip(scan.columns(d_b));
    let tasks: Vec<_> = scan.tasks().zip(rooms).collect();
    type Rooms<'o, T, const P: usize> = ([Columns<'o, T>; P], [Columns<'o, T>; P]);
    let work = |(): &mut (), ((batch, channels), (mut d_a, mut d_b)): ((usize, Range<usize>), Rooms<'_, T, P>)| {
        let nothing = [&nothing[..channels.len()]; P];
        for n in (0..scan.steps).rev() {
            let step = scan.step(n);
            let d_h = cut(d_h, scan.row(batch, step, &channels));
            if n + 1 == scan.steps {
                d_b.each_mut().into_iter().zip(d_h).for_each(|(d_b, d_h)| d_b.row(step).copy_from_slice(d_h));
            } else {
                let next = scan.step(n + 1);
                let (after, into) = unzip(d_b.each_mut().map(|d_b| d_b.pair(next, step)));
                verbs.recur(into, cut(a, scan.row(batch, next, &channels)), after, d_h, true);
            }
            let of = batch * scan.channels;
            let before = match n {
                0 => state.map(|state| cut(state, of + channels.start..of + channels.end)),
                n => Some(cut(h, scan.row(batch, scan.step(n - 1), &channels))),
            };
            let d_b = d_b.each_mut().map(|d_b| &*d_b.row(step));
            verbs.recur(d_a.each_mut().map(|d_a| d_a.row(step)), before.unwrap_or(nothing), d_b, nothing, true);
        }
    };
    parallel::run_brief(scan.nanoseconds::<T>(6 * P), tasks, || (), work);
}

/// The gradient of the state, from that of b; 0 without steps.
pub fn first_gradient<T: Element, const P: usize>(
    scan: DiagonalScan,
    a: [&[T]; P],
    d_b: [&[T]; P],
    mut into: [&mut [T]; P],
) {
    if scan.len() == 0 {
        return into.into_iter().for_each(|part| part.fill(T::ZERO));
    }
    let zeros = vec![T::ZERO; scan.channels];
    for batch in 0..scan.batch {
        let at = scan.row(batch, scan.step(0), &(0..scan.channels));
        let to = into.each_mut().map(|part| &mut part[batch * scan.channels..][..scan.channels]);
        T::verbs().recur(to, cut(a, at.clone()), cut(d_b, at), [&zeros; P], true);
    }
}
