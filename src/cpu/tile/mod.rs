//! Verbs on tiles, compiled for every instruction set.
//!
//! A tile is a slice of rows padded to whole vectors. The engines call the verbs through [`Verbs`], a table of
//! functions for the instruction set chosen at run time, so they are compiled once and hold no `unsafe` code.

#[cfg(feature = "candle")]
mod activations;
pub mod bf16;
#[cfg(feature = "candle")]
mod convolution;
mod decayed;
mod dropout;
mod in_place;
#[cfg(feature = "candle")]
mod loss;
mod maps;
mod multiply;
mod pairs;
#[cfg(feature = "candle")]
mod parts;
mod room;
#[cfg(feature = "candle")]
mod scan;
mod scores;
mod transpose;

pub use dropout::PairRow;
pub use in_place::{Elements, StoredRows};
pub use maps::Decays;
pub use multiply::{Band, Left, Product, Right};
use multiply::{PANEL_VECTORS, Place};
pub use pairs::Pairs;
pub use room::{Bits, room};
#[cfg(feature = "candle")]
pub use scan::{Step, StepGradients};
pub use scores::{Bounds, Delta, Online};

#[cfg(target_arch = "aarch64")]
use super::simd::Neon;
#[cfg(target_arch = "x86_64")]
use super::simd::{Avx2, Avx512};
use super::simd::{Isa, Portable, Real, Simd};
#[cfg(feature = "candle")]
use crate::activation::Activation;
use crate::linear::FeatureMap;
use crate::problem::Dropout;

/// Declares the table and, per instruction set, the functions in it.
macro_rules! verbs {
    ($($(#[$when:meta])? $verb:ident = $module:ident::$function:ident($($argument:ident: $type:ty),*);)*) => {
        /// The verbs of one instruction set for sums in T.
        pub struct Verbs<T: 'static> {
            /// Numbers in a vector.
            pub lanes: usize,
            /// Columns in a panel of a right operand.
            pub panel: usize,
            $($(#[$when])? $verb: unsafe fn($($type),*),)*
        }

        macro_rules! table {
            ($name:ident, $simd:ty, $features:meta) => {
                mod $name {
                    use super::*;

                    $(
                        $(#[$when])?
                        // SAFETY: as the generic function, whose instruction set is enabled here.
                        #[$features]
                        #[allow(clippy::too_many_arguments)]
                        unsafe fn $verb<T: Real>($($argument: $type),*) where $simd: Simd<T> {
                            unsafe { $module::$function::<T, $simd>($($argument),*) }
                        }
                    )*

                    pub const fn table<T: Real>() -> Verbs<T> where $simd: Simd<T> {
                        let lanes = <$simd as Simd<T>>::LANES;
                        Verbs { lanes, panel: PANEL_VECTORS * lanes, $($(#[$when])? $verb: $verb::<T>,)* }
                    }
                }
            };
        }
    };
}

/// The table of `isa` for sums in the type `$t`.
macro_rules! tables {
    ($t:ty, $isa:expr) => {
        match $isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 | Isa::Avx512 if Isa::Avx512.is_available() => {
                static TABLE: Verbs<$t> = avx512::table();
                &TABLE
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 if Isa::Avx2.is_available() => {
                static TABLE: Verbs<$t> = avx2::table();
                &TABLE
            }
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => {
                static TABLE: Verbs<$t> = neon::table();
                &TABLE
            }
            _ => {
                static TABLE: Verbs<$t> = portable::table();
                &TABLE
            }
        }
    };
}

verbs! {
    multiply = multiply::plain(out: &mut [T], to: Place, left: Left<'_, T>, right: Right<'_, T>, size: Product);
    transpose = transpose::vectors(into: &mut [T], from: &[T], row: usize, rows: usize, width: usize);
    inner_products = in_place::inner_products(out: &mut [T], row: usize, left: &[T], rows: StoredRows<'_, T>);
    add_weighted = in_place::add_weighted(sums: &mut [T], weights: &[T], row: usize, rows: StoredRows<'_, T>);
    faded_rows = in_place::faded_rows(
        into: &mut [T], row: usize, rows: StoredRows<'_, T>, decays: Option<&[T]>, outer: &[(&[T], &[T])]
    );
    between_panels = transpose::between_panels(into: &mut [T], from: &[T], rows: usize, width: usize);
    softmax = scores::softmax(scores: &mut [T], width: usize, bounds: &[Bounds], scale: T, online: &mut Online<'_, T>);
    softmax_gradient = scores::softmax_gradient(
        scores: &mut [T], d_scores: &mut [T], width: usize, bounds: &[Bounds], scale: T, statistic: &[T], delta: Delta<'_, T>
    );
    relu = scores::relu(scores: &mut [T], width: usize, bounds: &[Bounds], scale: T, squared: bool, sums: &mut [T]);
    relu_gradient = scores::relu_gradient(
        scores: &mut [T], d_scores: &mut [T], width: usize, bounds: &[Bounds], scale: T, squared: bool, delta: Delta<'_, T>
    );
    scaled_tanh = scores::scaled_tanh(row: &mut [T], scale: T);
    dropout = dropout::dropout(factors: &mut [T], row: PairRow, dropout: Dropout);
    map = maps::map(into: &mut [T], from: &[T], map: FeatureMap);
    map_gradient = maps::map_gradient(d_x: &mut [T], d_phi: &[T], x: &[T], phi: &[T], map: FeatureMap);
    row_maxima = maps::row_maxima(tile: &[T], width: usize, maxima: &mut [T]);
    exp_rows = maps::exp_rows(tile: &mut [T], width: usize, shifts: &[T], factor: T);
    row_products = maps::row_products(tile: &[T], width: usize, vector: &[T], products: &mut [T]);
    row_pair_products = maps::row_pair_products(a: &[T], b: &[T], width: usize, products: &mut [T]);
    add_outer = maps::add_outer(tile: &mut [T], width: usize, factors: &[T], vector: &[T]);
    add_scaled = maps::add_scaled(tile: &mut [T], other: &[T], width: usize, factors: &[T]);
    multiply_elements = maps::multiply_elements(tile: &mut [T], other: &[T]);
    add_rows = maps::add_rows(vector: &mut [T], tile: &[T], width: usize, factors: &[T]);
    scale_rows = maps::scale_rows(tile: &mut [T], width: usize, factors: &[T]);
    scaled_rows = maps::scaled_rows(into: &mut [T], tile: &[T], width: usize, factors: &[T]);
    combine = maps::combine(into: &mut [T], a: &[T], factor: T, b: &[T]);
    fade = decayed::fade(tile: &mut [T], width: usize, factors: &[T]);
    gather_faded = decayed::gather_faded(tile: &mut [T], width: usize, factors: &[T]);
    add_row_pair_products = decayed::add_row_pair_products(products: &mut [T], tiles: [&[T]; 2], row: usize, width: usize);
    add_products = decayed::add_products(into: &mut [T], a: &[T], b: &[T]);
    causal_weights = maps::causal_weights(tile: &mut [T], width: usize, decays: Option<Decays<'_>>, sums: &mut [T]);
    #[cfg(feature = "candle")]
    activate = activations::activate(into: &mut [T], x: &[T], gated: Option<&[T]>, activation: Activation);
    #[cfg(feature = "candle")]
    activate_gradient = activations::activate_gradient(
        d_x: &mut [T], d_y: &[T], x: &[T], gated: Option<(&[T], &mut [T])>, activation: Activation
    );
    #[cfg(feature = "candle")]
    weighted_rows = convolution::weighted_rows(into: &mut [T], weights: &[&[T]], rows: &[&[T]]);
    #[cfg(feature = "candle")]
    add_row_products = convolution::add_row_products(sums: &mut [T], row: &[T], rows: &[&[T]]);
    #[cfg(feature = "candle")]
    log_sum_exp = loss::log_sum_exp(row: &[T], result: &mut T);
    #[cfg(feature = "candle")]
    scaled_exp = loss::scaled_exp(into: &mut [T], row: &[T], shift: T, factor: T);
    #[cfg(feature = "candle")]
    recur = scan::recur(into: &mut [T], a: &[T], x: &[T], b: &[T]);
    #[cfg(feature = "candle")]
    recur_complex = scan::recur_complex(
        into: [&mut [T]; 2], a: [&[T]; 2], x: [&[T]; 2], b: [&[T]; 2], conjugate: bool
    );
    #[cfg(feature = "candle")]
    selective = scan::selective(h: &mut [T], width: usize, a: &[T], step: Step<'_, T>, y: &mut [T]);
    #[cfg(feature = "candle")]
    selective_gradient = scan::selective_gradient(
        d_h: &mut [T], before: &[T], width: usize, a: &[T], step: Step<'_, T>, d_y: &[T], to: StepGradients<'_, T>
    );
}

#[cfg(target_arch = "x86_64")]
table!(avx512, Avx512, target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"));
#[cfg(target_arch = "x86_64")]
table!(avx2, Avx2, target_feature(enable = "avx2,fma,f16c"));
#[cfg(target_arch = "aarch64")]
table!(neon, Neon, target_feature(enable = "neon"));
table!(portable, Portable, inline);

impl Verbs<f32> {
    /// The table for `isa`, or the portable one where the processor has not got it.
    pub fn get(isa: Isa) -> &'static Self {
        tables!(f32, isa)
    }
}

impl Verbs<f64> {
    /// The table for `isa`, or the portable one where the processor has not got it.
    pub fn get(isa: Isa) -> &'static Self {
        tables!(f64, isa)
    }
}

// SAFETY of all: a table is handed out only where its instruction set is available, and sizes are checked here.
impl<T: Real> Verbs<T> {
    /// `size` rounded up to whole vectors.
    pub fn padded(&self, size: usize) -> usize {
        size.next_multiple_of(self.lanes)
    }

    /// Numbers in the panels of the transpose of `rows` × `width` numbers.
    pub fn panels_len(&self, rows: usize, width: usize) -> usize {
        rows.next_multiple_of(self.panel) * width
    }

    /// A right operand that is row-major.
    pub fn rows<'a, X>(&self, data: &'a [X], row: usize) -> Right<'a, X> {
        Right { data, row, panel: self.panel }
    }

    /// A right operand that `transpose` has written, for rows of `width`.
    pub fn panels<'a, X>(&self, data: &'a [X], width: usize) -> Right<'a, X> {
        Right { data, row: self.panel, panel: self.panel * width }
    }

    /// out (+)= left · right, in rows of `row` numbers.
    pub fn multiply(&self, out: &mut [T], row: usize, left: Left<'_, T>, right: Right<'_, T>, size: Product) {
        self.multiply_into(out, Place { row, panel: self.panel }, left, right, size);
    }

    /// out (+)= left · right, in panels of `rows` rows, as [`Self::panels`] reads it.
    pub fn multiply_panels(&self, out: &mut [T], rows: usize, left: Left<'_, T>, right: Right<'_, T>, size: Product) {
        self.multiply_into(out, Place { row: self.panel, panel: rows * self.panel }, left, right, size);
    }

    fn multiply_into(&self, out: &mut [T], to: Place, left: Left<'_, T>, right: Right<'_, T>, size: Product) {
        multiply::check(out, to, &left, &right, &size, self.panel, self.lanes);
        unsafe { (self.multiply)(out, to, left, right, size) }
    }

    /// Writes the panels of the transpose of `rows` rows of `width` numbers.
    pub fn transpose(&self, into: &mut [T], from: &[T], row: usize, rows: usize, width: usize) {
        unsafe { (self.transpose)(into, from, row, rows, width) }
    }

    /// See [`in_place::inner_products`].
    pub fn inner_products(&self, out: &mut [T], row: usize, left: &[T], rows: StoredRows<'_, T>) {
        let count = self.check_rows(left, &rows);
        assert!(count == 0 || rows.count == 0 || (count - 1) * row + rows.count <= out.len());
        unsafe { (self.inner_products)(out, row, left, rows) }
    }

    /// See [`in_place::add_weighted`].
    pub fn add_weighted(&self, sums: &mut [T], weights: &[T], row: usize, rows: StoredRows<'_, T>) {
        let count = self.check_rows(sums, &rows);
        assert!(count == 0 || rows.count == 0 || (count - 1) * row + rows.count <= weights.len());
        unsafe { (self.add_weighted)(sums, weights, row, rows) }
    }

    /// See [`in_place::faded_rows`].
    pub fn faded_rows(
        &self,
        into: &mut [T],
        row: usize,
        rows: StoredRows<'_, T>,
        decays: Option<&[T]>,
        outer: &[(&[T], &[T])],
    ) {
        rows.check();
        unsafe { (self.faded_rows)(into, row, rows, decays, outer) }
    }

    /// Writes the panels of the transpose of `rows` rows of `width` numbers that lie in panels.
    pub fn between_panels(&self, into: &mut [T], from: &[T], rows: usize, width: usize) {
        unsafe { (self.between_panels)(into, from, rows, width) }
    }

    /// See [`scores::softmax`].
    pub fn softmax(&self, scores: &mut [T], width: usize, bounds: &[Bounds], scale: T, online: &mut Online<'_, T>) {
        self.check_scores(scores, width, bounds);
        unsafe { (self.softmax)(scores, width, bounds, scale, online) }
    }

    /// See [`scores::softmax_gradient`].
    #[allow(clippy::too_many_arguments)]
    pub fn softmax_gradient(
        &self,
        scores: &mut [T],
        d_scores: &mut [T],
        width: usize,
        bounds: &[Bounds],
        scale: T,
        statistic: &[T],
        delta: Delta<'_, T>,
    ) {
        self.check_scores(scores, width, bounds);
        self.check_scores(d_scores, width, bounds);
        unsafe { (self.softmax_gradient)(scores, d_scores, width, bounds, scale, statistic, delta) }
    }

    /// See [`scores::relu`].
    pub fn relu(&self, scores: &mut [T], width: usize, bounds: &[Bounds], scale: T, squared: bool, sums: &mut [T]) {
        self.check_scores(scores, width, bounds);
        unsafe { (self.relu)(scores, width, bounds, scale, squared, sums) }
    }

    /// See [`scores::relu_gradient`].
    #[allow(clippy::too_many_arguments)]
    pub fn relu_gradient(
        &self,
        scores: &mut [T],
        d_scores: &mut [T],
        width: usize,
        bounds: &[Bounds],
        scale: T,
        squared: bool,
        delta: Delta<'_, T>,
    ) {
        self.check_scores(scores, width, bounds);
        self.check_scores(d_scores, width, bounds);
        unsafe { (self.relu_gradient)(scores, d_scores, width, bounds, scale, squared, delta) }
    }

    /// x → tanh(scale·x).
    pub fn scaled_tanh(&self, row: &mut [T], scale: T) {
        unsafe { (self.scaled_tanh)(row, scale) }
    }

    /// The factors of a row of pairs: 0 or 1/(1 − p).
    pub fn dropout(&self, factors: &mut [T], row: PairRow, dropout: Dropout) {
        unsafe { (self.dropout)(factors, row, dropout) }
    }

    /// φ of the maps that act on single numbers; other maps copy.
    pub fn map(&self, into: &mut [T], from: &[T], map: FeatureMap) {
        unsafe { (self.map)(into, from, map) }
    }

    /// dx = dφ ⊙ φ′(x) for the same maps, from x and φ(x).
    pub fn map_gradient(&self, d_x: &mut [T], d_phi: &[T], x: &[T], phi: &[T], map: FeatureMap) {
        unsafe { (self.map_gradient)(d_x, d_phi, x, phi, map) }
    }

    /// Each row's largest number.
    pub fn row_maxima(&self, tile: &[T], width: usize, maxima: &mut [T]) {
        unsafe { (self.row_maxima)(tile, width, maxima) }
    }

    /// x → factor·exp(x − shift) with a shift per row.
    pub fn exp_rows(&self, tile: &mut [T], width: usize, shifts: &[T], factor: T) {
        unsafe { (self.exp_rows)(tile, width, shifts, factor) }
    }

    /// Inner products of each row with a vector.
    pub fn row_products(&self, tile: &[T], width: usize, vector: &[T], products: &mut [T]) {
        unsafe { (self.row_products)(tile, width, vector, products) }
    }

    /// Inner products of the rows of two tiles.
    pub fn row_pair_products(&self, a: &[T], b: &[T], width: usize, products: &mut [T]) {
        unsafe { (self.row_pair_products)(a, b, width, products) }
    }

    /// Adds factors\[r\]·vector to row r.
    pub fn add_outer(&self, tile: &mut [T], width: usize, factors: &[T], vector: &[T]) {
        unsafe { (self.add_outer)(tile, width, factors, vector) }
    }

    /// Adds factors\[r\] times row r of another tile.
    pub fn add_scaled(&self, tile: &mut [T], other: &[T], width: usize, factors: &[T]) {
        unsafe { (self.add_scaled)(tile, other, width, factors) }
    }

    /// tile ← tile ⊙ other
    pub fn multiply_elements(&self, tile: &mut [T], other: &[T]) {
        unsafe { (self.multiply_elements)(tile, other) }
    }

    /// Adds factors\[r\] times row r to a vector.
    pub fn add_rows(&self, vector: &mut [T], tile: &[T], width: usize, factors: &[T]) {
        unsafe { (self.add_rows)(vector, tile, width, factors) }
    }

    /// Multiplies row r by factors\[r\].
    pub fn scale_rows(&self, tile: &mut [T], width: usize, factors: &[T]) {
        unsafe { (self.scale_rows)(tile, width, factors) }
    }

    /// into\[r\] ← factors\[r\]·row r
    pub fn scaled_rows(&self, into: &mut [T], tile: &[T], width: usize, factors: &[T]) {
        unsafe { (self.scaled_rows)(into, tile, width, factors) }
    }

    /// into ← factor·a + b, for lengths of whole vectors.
    pub fn combine(&self, into: &mut [T], a: &[T], factor: T, b: &[T]) {
        unsafe { (self.combine)(into, a, factor, b) }
    }

    /// See [`decayed::fade`].
    pub fn fade(&self, tile: &mut [T], width: usize, factors: &[T]) {
        assert!(width.is_multiple_of(self.lanes) && tile.len() == factors.len() && tile.len().is_multiple_of(width));
        unsafe { (self.fade)(tile, width, factors) }
    }

    /// See [`decayed::gather_faded`].
    pub fn gather_faded(&self, tile: &mut [T], width: usize, factors: &[T]) {
        assert!(width.is_multiple_of(self.lanes) && tile.len() == factors.len() && tile.len().is_multiple_of(width));
        unsafe { (self.gather_faded)(tile, width, factors) }
    }

    /// See [`decayed::add_row_pair_products`].
    pub fn add_row_pair_products(&self, products: &mut [T], tiles: [&[T]; 2], row: usize, width: usize) {
        unsafe { (self.add_row_pair_products)(products, tiles, row, width) }
    }

    /// into ← into + a ⊙ b
    pub fn add_products(&self, into: &mut [T], a: &[T], b: &[T]) {
        unsafe { (self.add_products)(into, a, b) }
    }

    /// See [`maps::causal_weights`].
    pub fn causal_weights(&self, tile: &mut [T], width: usize, decays: Option<Decays<'_>>, sums: &mut [T]) {
        assert!(width <= 64 && tile.len() <= width * width);
        unsafe { (self.causal_weights)(tile, width, decays, sums) }
    }

    /// See [`activations::activate`].
    #[cfg(feature = "candle")]
    pub fn activate(&self, into: &mut [T], x: &[T], gated: Option<&[T]>, activation: Activation) {
        assert!(x.len() == into.len() && gated.is_none_or(|gated| gated.len() == into.len()));
        unsafe { (self.activate)(into, x, gated, activation) }
    }

    /// See [`activations::activate_gradient`].
    #[cfg(feature = "candle")]
    pub fn activate_gradient(
        &self,
        d_x: &mut [T],
        d_y: &[T],
        x: &[T],
        gated: Option<(&[T], &mut [T])>,
        activation: Activation,
    ) {
        let len = d_x.len();
        assert!(d_y.len() == len && x.len() == len);
        assert!(gated.as_ref().is_none_or(|(gated, d_gated)| gated.len() == len && d_gated.len() == len));
        unsafe { (self.activate_gradient)(d_x, d_y, x, gated, activation) }
    }

    /// See [`convolution::weighted_rows`].
    #[cfg(feature = "candle")]
    pub fn weighted_rows(&self, into: &mut [T], weights: &[&[T]], rows: &[&[T]]) {
        let is_whole = |slice: &&[T]| slice.len() == into.len();
        assert!(weights.len() == rows.len() && weights.iter().chain(rows).all(is_whole));
        unsafe { (self.weighted_rows)(into, weights, rows) }
    }

    /// See [`convolution::add_row_products`].
    #[cfg(feature = "candle")]
    pub fn add_row_products(&self, sums: &mut [T], row: &[T], rows: &[&[T]]) {
        assert!(sums.len() == row.len() * rows.len() && rows.iter().all(|other| other.len() == row.len()));
        unsafe { (self.add_row_products)(sums, row, rows) }
    }

    /// ln Σ exp(x) of a row.
    #[cfg(feature = "candle")]
    pub fn log_sum_exp(&self, row: &[T]) -> T {
        let mut result = T::NEG_INFINITY;
        if !row.is_empty() {
            unsafe { (self.log_sum_exp)(row, &mut result) }
        }
        result
    }

    /// into = factor·exp(row − shift)
    #[cfg(feature = "candle")]
    pub fn scaled_exp(&self, into: &mut [T], row: &[T], shift: T, factor: T) {
        assert!(row.len() == into.len());
        unsafe { (self.scaled_exp)(into, row, shift, factor) }
    }

    /// into = a ⊙ x + b, of numbers or of complex ones, real parts before imaginary ones, with a or its conjugate.
    #[cfg(feature = "candle")]
    pub fn recur<const P: usize>(
        &self,
        into: [&mut [T]; P],
        a: [&[T]; P],
        x: [&[T]; P],
        b: [&[T]; P],
        conjugate: bool,
    ) {
        let len = into.first().map_or(0, |part| part.len());
        assert!(into.iter().all(|part| part.len() == len));
        assert!([a, x, b].iter().flatten().all(|part| part.len() == len));
        let mut into = into.into_iter();
        match (into.next(), into.next()) {
            (Some(into), None) => unsafe { (self.recur)(into, a[0], x[0], b[0]) },
            (Some(re), Some(im)) => unsafe {
                (self.recur_complex)([re, im], [a[0], a[1]], [x[0], x[1]], [b[0], b[1]], conjugate)
            },
            _ => {}
        }
    }

    /// See [`scan::selective`].
    #[cfg(feature = "candle")]
    pub fn selective(&self, h: &mut [T], width: usize, a: &[T], step: Step<'_, T>, y: &mut [T]) {
        self.check_step(&step, [h.len(), a.len()], width, y.len());
        unsafe { (self.selective)(h, width, a, step, y) }
    }

    /// See [`scan::selective_gradient`].
    #[cfg(feature = "candle")]
    #[allow(clippy::too_many_arguments)]
    pub fn selective_gradient(
        &self,
        d_h: &mut [T],
        before: &[T],
        width: usize,
        a: &[T],
        step: Step<'_, T>,
        d_y: &[T],
        to: StepGradients<'_, T>,
    ) {
        self.check_step(&step, [d_h.len(), a.len()], width, d_y.len());
        self.check_step(&step, [before.len(), to.a.len()], width, to.u.len());
        assert!(to.delta.len() == d_y.len() && to.b.len() == step.b.len() && to.c.len() == step.c.len());
        unsafe { (self.selective_gradient)(d_h, before, width, a, step, d_y, to) }
    }

    #[cfg(feature = "candle")]
    fn check_step(&self, step: &Step<'_, T>, tiles: [usize; 2], width: usize, channels: usize) {
        assert!(width.is_multiple_of(self.lanes) && channels <= width && step.b.len() == step.c.len());
        assert!(tiles == [width * step.b.len(); 2] && step.delta.len() == channels && step.u.len() == channels);
    }

    /// Whole rows in `tile`, as wide as those in place, which are all inside their elements; returns how many.
    fn check_rows(&self, tile: &[T], rows: &StoredRows<'_, T>) -> usize {
        rows.check();
        let width = self.padded(rows.width);
        assert!(width > 0 && tile.len().is_multiple_of(width));
        tile.len() / width
    }

    /// Rows of whole vectors, with every bound inside.
    fn check_scores(&self, scores: &[T], width: usize, bounds: &[Bounds]) {
        assert!(width.is_multiple_of(self.lanes) && scores.len() == width * bounds.len());
        assert!(bounds.iter().all(|&(low, high)| low >= high || high <= width));
    }
}

/// Asks for elements that will be read soon.
pub fn prefetch<X>(elements: &[X]) {
    #[cfg(target_arch = "x86_64")]
    for line in elements.chunks((64 / size_of::<X>()).max(1)) {
        // SAFETY: a prefetch reads nothing.
        unsafe { std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(line.as_ptr().cast()) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = elements;
}
