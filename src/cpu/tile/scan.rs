//! Steps of recurrences of numbers on their own. Slices of any length.

use super::super::simd::{Real, Simd, exps};
use super::parts::{load, store};

/// States whose exponentials are taken side by side: each is a chain of operations that wait for each other.
const CHAINS: usize = 4;

/// into = a ⊙ x + b
///
/// # Safety
/// The processor has the instruction set of S; all slices have one length.
#[inline(always)]
pub unsafe fn recur<T: Real, S: Simd<T>>(into: &mut [T], a: &[T], x: &[T], b: &[T]) {
    for (piece, to) in into.chunks_mut(S::LANES).enumerate() {
        let at = piece * S::LANES;
        // SAFETY: the caller's.
        unsafe {
            let [a, x, b] = [a, x, b].map(|from| load::<T, S>(&from[at..]));
            store::<T, S>(to, S::fma(a, x, b));
        }
    }
}

/// The same of complex numbers, real parts before imaginary ones, with a or its conjugate.
///
/// # Safety
/// As [`recur`].
#[inline(always)]
pub unsafe fn recur_complex<T: Real, S: Simd<T>>(
    into: [&mut [T]; 2],
    a: [&[T]; 2],
    x: [&[T]; 2],
    b: [&[T]; 2],
    conjugate: bool,
) {
    let [re, im] = into;
    for (piece, (re, im)) in re.chunks_mut(S::LANES).zip(im.chunks_mut(S::LANES)).enumerate() {
        let at = piece * S::LANES;
        // SAFETY: the caller's.
        unsafe {
            let [[a, mut i], x, b] = [a, x, b].map(|parts| parts.map(|from| load::<T, S>(&from[at..])));
            if conjugate {
                i = S::sub(S::splat(T::ZERO), i);
            }
            store::<T, S>(re, S::fma(a, x[0], S::sub(b[0], S::mul(i, x[1]))));
            store::<T, S>(im, S::fma(a, x[1], S::fma(i, x[0], b[1])));
        }
    }
}

/// What a selective scan reads of one step, of some channels: Δ and u for each of them, B and C for each state.
#[derive(Clone, Copy)]
pub struct Step<'a, T> {
    pub delta: &'a [T],
    pub u: &'a [T],
    pub b: &'a [T],
    pub c: &'a [T],
}

/// h ← exp(Δ a) ⊙ h + Δ u b, y = Σ c h over the states. h and a have a row of `width` channels for each state, whole vectors
/// that hold those of the step.
///
/// # Safety
/// The processor has the instruction set of S; sizes are as said.
#[inline(always)]
#[allow(clippy::needless_range_loop)] // plain indices unroll
pub unsafe fn selective<T: Real, S: Simd<T>>(h: &mut [T], width: usize, a: &[T], step: Step<'_, T>, y: &mut [T]) {
    for (piece, y) in y.chunks_mut(S::LANES).enumerate() {
        let at = piece * S::LANES;
        // SAFETY: the caller's.
        unsafe {
            let delta = load::<T, S>(&step.delta[at..]);
            let added = S::mul(delta, load::<T, S>(&step.u[at..]));
            let mut sums = [S::splat(T::ZERO); CHAINS];
            let mut state = 0;
            while state < step.b.len() {
                let count = CHAINS.min(step.b.len() - state);
                let mut decays = [S::splat(T::ZERO); CHAINS];
                for i in 0..count {
                    decays[i] = S::mul(delta, S::load(a.as_ptr().add((state + i) * width + at)));
                }
                let decays = exps::<T, S, CHAINS, true>(decays);
                for i in 0..count {
                    let place = h.as_mut_ptr().add((state + i) * width + at);
                    let next = S::fma(decays[i], S::load(place), S::mul(added, S::splat(step.b[state + i])));
                    S::store(place, next);
                    sums[i] = S::fma(next, S::splat(step.c[state + i]), sums[i]);
                }
                state += count;
            }
            store::<T, S>(y, S::add(S::add(sums[0], sums[1]), S::add(sums[2], sums[3])));
        }
    }
}

/// Gradients of one step of [`selective`], of its channels and states. Those of Δ and u are written, the others added to.
pub struct StepGradients<'a, T> {
    pub delta: &'a mut [T],
    pub u: &'a mut [T],
    /// A row of `width` channels for each state.
    pub a: &'a mut [T],
    pub b: &'a mut [T],
    pub c: &'a mut [T],
}

/// The way back through a step: `before` is h as it entered it; `d_h` becomes from the gradient of what left the step, but for
/// its y, that of what entered it.
///
/// # Safety
/// As [`selective`].
#[inline(always)]
#[allow(clippy::too_many_arguments)]
pub unsafe fn selective_gradient<T: Real, S: Simd<T>>(
    d_h: &mut [T],
    before: &[T],
    width: usize,
    a: &[T],
    step: Step<'_, T>,
    d_y: &[T],
    to: StepGradients<'_, T>,
) {
    to.delta.fill(T::ZERO);
    to.u.fill(T::ZERO);
    for state in 0..step.b.len() {
        // SAFETY: the caller's.
        unsafe {
            let (b, c) = (S::splat(step.b[state]), S::splat(step.c[state]));
            let [mut d_b, mut d_c] = [S::splat(T::ZERO); 2];
            for at in (0..d_y.len()).step_by(S::LANES) {
                let place = state * width + at;
                let delta = load::<T, S>(&step.delta[at..]);
                let u = load::<T, S>(&step.u[at..]);
                let d_y = load::<T, S>(&d_y[at..]);
                let a = S::load(a.as_ptr().add(place));
                let [decay] = exps::<T, S, 1, true>([S::mul(delta, a)]);
                let kept = S::mul(decay, S::load(before.as_ptr().add(place)));
                let added = S::mul(delta, u);
                d_c = S::fma(d_y, S::fma(added, b, kept), d_c);
                let d_next = S::fma(c, d_y, S::load(d_h.as_ptr().add(place)));
                S::store(d_h.as_mut_ptr().add(place), S::mul(d_next, decay));
                d_b = S::fma(d_next, added, d_b);
                let [d_exponent, d_added] = [S::mul(d_next, kept), S::mul(d_next, b)];
                let d_a = to.a.as_mut_ptr().add(place);
                S::store(d_a, S::fma(d_exponent, delta, S::load(d_a)));
                let d_delta = S::fma(d_exponent, a, S::mul(d_added, u));
                let sum = S::add(load::<T, S>(&to.delta[at..]), d_delta);
                store::<T, S>(&mut to.delta[at..], sum);
                let sum = S::fma(d_added, delta, load::<T, S>(&to.u[at..]));
                store::<T, S>(&mut to.u[at..], sum);
            }
            to.b[state] += S::sum(d_b);
            to.c[state] += S::sum(d_c);
        }
    }
}
