//! How the state fades within a chunk.

use std::ops::Range;

use super::super::buffer::Buffer;
use super::super::rows::{HeadRows, Number};
use super::super::tile::{Band, Left, Product};
use super::{CHUNK, Context, StateHead};
use crate::linear::FeatureMap;
use crate::problem::DeltaDecay;

/// Factors of the tokens of a chunk, and their products: over the tokens up to each one, over those behind it, and between
/// two. As products, not as differences of sums, in which small decays behind a strong one would be lost.
pub struct Fade<T> {
    form: DeltaDecay,
    rows: usize,
    /// Per token, for a scalar decay.
    through: [T; CHUNK],
    behind: [T; CHUNK],
    /// Entry (i, j): over the tokens after j up to i.
    between: [[T; CHUNK]; CHUNK],
    /// Per token and channel.
    factors: Buffer<T>,
    all_through: Buffer<T>,
    all_behind: Buffer<T>,
    /// Rows on their way through the chunk.
    faded: Buffer<T>,
    /// Gradients on their way back.
    gathered: Buffer<T>,
    /// Sums over tokens, per channel.
    sum: Buffer<T>,
    products: [T; CHUNK],
    panels: Buffer<T>,
}

/// Which products of a reading and an added row there are.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Reach {
    /// A row reads what the tokens up to its own have added, after its decay.
    Own,
    /// A row reads what the tokens before have added, after its own token's decay.
    After,
    /// A row reads what the tokens before have added, before its own token's decay.
    Before,
}

impl Reach {
    /// Distance from an added row to the first one that reads it.
    fn first(self) -> usize {
        usize::from(self != Self::Own)
    }

    /// By how many tokens the reading comes before its own decay.
    fn early(self) -> usize {
        usize::from(self == Self::Before)
    }

    /// Added rows that row i reads.
    pub fn count(self, i: usize) -> usize {
        i + 1 - self.first()
    }
}

impl<T: Number> Fade<T> {
    pub fn new(context: &Context<'_, T>) -> Self {
        let (d, _) = context.padded();
        let form = context.shapes().decay;
        let channels = if form == DeltaDecay::Channel { context.rows() * d } else { 0 };
        let zeros = || Buffer::zeros(channels);
        Self {
            form,
            rows: 0,
            through: [T::ONE; CHUNK],
            behind: [T::ONE; CHUNK],
            between: [[T::ONE; CHUNK]; CHUNK],
            factors: zeros(),
            all_through: zeros(),
            all_behind: zeros(),
            faded: zeros(),
            gathered: zeros(),
            sum: Buffer::zeros(d),
            products: [T::ZERO; CHUNK],
            panels: Buffer::zeros(context.verbs.panels_len(context.rows(), d)),
        }
    }

    /// The decays of some tokens of a state head.
    pub fn load(&mut self, context: &Context<'_, T>, at: StateHead, tokens: Range<usize>) {
        self.rows = tokens.len();
        match self.form {
            DeltaDecay::None => {}
            DeltaDecay::Channel => self.load_channels(context, at, tokens),
            DeltaDecay::Head | DeltaDecay::Token => self.load_scalars(context, at, tokens),
        }
    }

    fn load_scalars(&mut self, context: &Context<'_, T>, at: StateHead, tokens: Range<usize>) {
        let shapes = context.shapes();
        let log_decay = |token| match self.form {
            _ if !context.keeps(at.batch, token) => 0.0,
            DeltaDecay::Head => context.log_decay[at.head],
            _ => context.log_decay[(at.batch * shapes.state_heads() + at.head) * shapes.tokens + token],
        };
        let (mut through, mut between) = (1.0, [0.0; CHUNK]);
        for (i, token) in tokens.enumerate() {
            let factor = f64::exp(log_decay(token));
            through *= factor;
            between[..i].iter_mut().for_each(|product| *product *= factor);
            between[i] = 1.0;
            self.through[i] = T::from_f64(through);
            self.between[i] = between.map(T::from_f64);
        }
        let last = self.rows.saturating_sub(1);
        self.behind = self.between[last];
    }

    fn load_channels(&mut self, context: &Context<'_, T>, at: StateHead, tokens: Range<usize>) {
        let Some(log_decay) = &context.inputs.log_decay else { return };
        let (verbs, (d, _)) = (context.verbs, context.padded());
        let len = self.rows * d;
        let factors = &mut self.factors[..len];
        // Masked tokens are zeroed unread, and e⁰ is 1.
        let keep = |token| context.keeps(at.batch, token);
        HeadRows::new(log_decay, at.batch, at.head).load_kept(tokens, &mut self.faded[..len], d, keep);
        verbs.map(factors, &self.faded[..len], FeatureMap::Exp);
        self.all_through[..len].copy_from_slice(factors);
        verbs.fade(&mut self.all_through[..len], d, factors);
        let behind = &mut self.all_behind[..len];
        behind.fill(T::ONE);
        for row in (1..self.rows).rev() {
            let (before, after) = behind.split_at_mut(row * d);
            let to = &mut before[(row - 1) * d..];
            to.copy_from_slice(&after[..d]);
            verbs.multiply_elements(to, &factors[row * d..][..d]);
        }
    }

    /// The rows under the decay from the chunk's start on.
    pub fn reading(&self, context: &Context<'_, T>, rows: &[T], reach: Reach, into: &mut [T]) {
        let (d, early) = (context.padded().0, reach.early());
        into.copy_from_slice(rows);
        let later = &mut into[(early * d).min(rows.len())..];
        match self.form {
            DeltaDecay::None => {}
            DeltaDecay::Channel => context.verbs.multiply_elements(later, &self.all_through),
            _ => context.verbs.scale_rows(later, d, &self.through),
        }
    }

    /// The rows under the decay to the chunk's end.
    pub fn added(&self, context: &Context<'_, T>, rows: &[T], into: &mut [T]) {
        into.copy_from_slice(rows);
        match self.form {
            DeltaDecay::None => {}
            DeltaDecay::Channel => context.verbs.multiply_elements(into, &self.all_behind),
            _ => context.verbs.scale_rows(into, context.padded().0, &self.behind),
        }
    }

    /// S ← decay of the whole chunk · S
    pub fn shrink(&self, context: &Context<'_, T>, state: &mut [T]) {
        let (d, e) = context.padded();
        let Some(last) = self.rows.checked_sub(1) else { return };
        match self.form {
            DeltaDecay::None => {}
            DeltaDecay::Channel => context.verbs.scale_rows(state, e, &self.all_through[last * d..][..d]),
            _ => {
                let len = state.len();
                context.verbs.scale_rows(state, len, &self.through[last..last + 1]);
            }
        }
    }

    /// The decay of the whole chunk per channel, which may need room for them; none where it is 1.
    pub fn whole<'s>(&'s self, context: &Context<'_, T>, room: &'s mut [T]) -> Option<&'s [T]> {
        let (d, last) = (context.padded().0, self.rows.checked_sub(1)?);
        match self.form {
            DeltaDecay::None => None,
            DeltaDecay::Channel => Some(&self.all_through[last * d..][..d]),
            _ => {
                room.fill(self.through[last]);
                Some(room)
            }
        }
    }

    /// Products of reading rows and added rows, under the decay between; 0 where there are none.
    pub fn products(&mut self, context: &Context<'_, T>, reads: &[(&[T], Reach)], added: &[T], into: &mut [&mut [T]]) {
        if self.form == DeltaDecay::Channel {
            self.channel_products(context, reads, added, into);
        } else {
            let (verbs, (d, _), rows) = (context.verbs, context.padded(), self.rows);
            verbs.transpose(&mut self.panels, added, d, rows, context.shapes().width);
            for ((read, _), into) in reads.iter().zip(&mut *into) {
                let band = Band::Result(1);
                let size =
                    Product { m: rows, n: verbs.padded(rows), k: context.shapes().width, accumulate: false, band };
                let right = verbs.panels(&self.panels, context.shapes().width);
                verbs.multiply(into, verbs.padded(CHUNK), Left::rows(read, d), right, size);
            }
        }
        for ((_, reach), into) in reads.iter().zip(into) {
            self.weigh(context, *reach, into);
        }
    }

    /// Puts scalar decays to products, and 0 where there are none.
    pub fn weigh(&self, context: &Context<'_, T>, reach: Reach, products: &mut [T]) {
        let width = context.verbs.padded(CHUNK);
        for (i, row) in products.chunks_exact_mut(width).take(self.rows).enumerate() {
            let (seen, hidden) = row.split_at_mut(reach.count(i));
            hidden.fill(T::ZERO);
            if matches!(self.form, DeltaDecay::Head | DeltaDecay::Token) {
                let between = &self.between[i.saturating_sub(reach.early())];
                seen.iter_mut().zip(between).for_each(|(product, &between)| *product = *product * between);
            }
        }
    }

    /// An added row on its way to the end of the chunk.
    fn follow(&mut self, context: &Context<'_, T>, added: &[T], j: usize) {
        let d = context.padded().0;
        let len = (self.rows - j) * d;
        self.faded[..d].copy_from_slice(&added[j * d..][..d]);
        context.verbs.fade(&mut self.faded[..len], d, &self.factors[j * d..][..len]);
    }

    fn channel_products(
        &mut self,
        context: &Context<'_, T>,
        reads: &[(&[T], Reach)],
        added: &[T],
        into: &mut [&mut [T]],
    ) {
        let (verbs, (d, _)) = (context.verbs, context.padded());
        let width = verbs.padded(CHUNK);
        for j in 0..self.rows {
            self.follow(context, added, j);
            for ((read, reach), into) in reads.iter().zip(&mut *into) {
                let (first, early) = (j + reach.first(), reach.early());
                let Some(rows) = self.rows.checked_sub(first).filter(|&rows| rows > 0) else { continue };
                let faded = &self.faded[(first - j - early) * d..][..rows * d];
                verbs.row_pair_products(&read[first * d..][..rows * d], faded, d, &mut self.products[..rows]);
                for (i, &product) in (first..).zip(&self.products[..rows]) {
                    into[i * width + j] = product;
                }
            }
        }
    }

    /// Turns gradients of the rows under their decays into those of the rows, adds those that come by the products, and
    /// adds to the gradient of the log-decay.
    pub fn gradient(&mut self, context: &Context<'_, T>, chunk: FadeGradient<'_, T>, d_log: &mut [T]) {
        match self.form {
            DeltaDecay::Channel => self.channel_gradient(context, chunk, d_log),
            _ => self.scalar_gradient(context, chunk, d_log),
        }
    }

    fn scalar_gradient(&mut self, context: &Context<'_, T>, chunk: FadeGradient<'_, T>, d_log: &mut [T]) {
        let (verbs, (d, _), rows) = (context.verbs, context.padded(), self.rows);
        let width = verbs.padded(CHUNK);
        let FadeGradient { reads, sources, state, products } = chunk;
        let has_decay = self.form != DeltaDecay::None;
        let mut changes = [0.0; CHUNK];
        if has_decay {
            // What crosses each token, in f64: from the state before, to the state behind, and between two tokens.
            let mut dots = [T::ZERO; CHUNK];
            for (read, d_read, reach) in &*reads {
                verbs.row_pair_products(d_read, read.faded, d, &mut dots[..rows]);
                for (i, dot) in dots[..rows].iter().enumerate() {
                    changes[..i + 1 - reach.early()].iter_mut().for_each(|change| *change += dot.to_f64());
                }
            }
            for (source, d_source) in &*sources {
                verbs.row_pair_products(d_source, source.faded, d, &mut dots[..rows]);
                for (j, dot) in dots[..rows].iter().enumerate() {
                    changes[j + 1..rows].iter_mut().for_each(|change| *change += dot.to_f64());
                }
            }
            let through: f64 = state.iter().map(|x| x.to_f64()).sum::<f64>() * self.through[rows - 1].to_f64();
            changes[..rows].iter_mut().for_each(|change| *change += through);
            for (index, (product, d_product)) in products.iter().enumerate() {
                let reach = reads[index / sources.len()].2;
                for i in 0..rows {
                    let (row, d_row) = (&product[i * width..], &d_product[i * width..]);
                    for j in 0..reach.count(i) {
                        let change = row[j].to_f64() * d_row[j].to_f64();
                        changes[j + 1..i + 1 - reach.early()].iter_mut().for_each(|to| *to += change);
                    }
                }
            }
            for (to, change) in d_log.iter_mut().zip(changes) {
                *to = T::from_f64(change);
            }
            for (_, d_read, reach) in &mut *reads {
                verbs.scale_rows(&mut d_read[(reach.early() * d).min(rows * d)..], d, &self.through);
            }
            for (_, d_source) in &mut *sources {
                verbs.scale_rows(d_source, d, &self.behind);
            }
        }
        let right = |rows_of| super::chunk::right(verbs, rows_of, d);
        let count = sources.len();
        for (index, (_, d_product)) in products.iter_mut().enumerate() {
            let reach = reads[index / count].2;
            self.weigh(context, reach, d_product);
            let size = |band| Product { m: rows, n: d, k: rows, accumulate: true, band };
            let offset = 1 - reach.first() as i64;
            let (read, d_read, _) = &mut reads[index / count];
            let (source, d_source) = &mut sources[index % count];
            verbs.multiply(d_read, d, Left::rows(d_product, width), right(source.rows), size(Band::Left(offset)));
            let left = Left::transposed(d_product, width);
            verbs.multiply(d_source, d, left, right(read.rows), size(Band::Transposed(offset)));
        }
    }

    fn channel_gradient(&mut self, context: &Context<'_, T>, chunk: FadeGradient<'_, T>, d_log: &mut [T]) {
        let (verbs, (d, _), rows) = (context.verbs, context.padded(), self.rows);
        let width = verbs.padded(CHUNK);
        let FadeGradient { reads, sources, state, products } = chunk;
        let d_log = &mut d_log[..rows * d];
        // From the state through the whole chunk.
        let last = &self.all_through[(rows - 1) * d..][..d];
        for row in d_log.chunks_exact_mut(d) {
            row[..state.len()].copy_from_slice(state);
            row[state.len()..].fill(T::ZERO);
            verbs.multiply_elements(row, last);
        }
        let sum = &mut self.sum;
        for (read, d_read, reach) in &mut *reads {
            sum.fill(T::ZERO);
            for i in (0..rows).rev() {
                let row = i * d..(i + 1) * d;
                if reach.early() == 0 {
                    verbs.add_products(sum, &d_read[row.clone()], &read.faded[row.clone()]);
                }
                verbs.add_outer(&mut d_log[row.clone()], d, &[T::ONE], sum);
                if reach.early() == 1 {
                    verbs.add_products(sum, &d_read[row.clone()], &read.faded[row]);
                }
            }
            verbs.multiply_elements(&mut d_read[(reach.early() * d).min(rows * d)..], &self.all_through);
        }
        for (source, d_source) in &mut *sources {
            sum.fill(T::ZERO);
            for j in 0..rows {
                let row = j * d..(j + 1) * d;
                verbs.add_outer(&mut d_log[row.clone()], d, &[T::ONE], sum);
                verbs.add_products(sum, &d_source[row.clone()], &source.faded[row]);
            }
            verbs.multiply_elements(d_source, &self.all_behind);
        }
        let count = sources.len();
        for (index, (source, d_source)) in sources.iter_mut().enumerate() {
            for j in 0..rows {
                self.follow(context, source.rows, j);
                let len = (rows - j) * d;
                let gathered = &mut self.gathered[..len];
                gathered.fill(T::ZERO);
                for (at, (read, d_read, reach)) in reads.iter_mut().enumerate() {
                    let (first, early) = (j + reach.first(), reach.early());
                    let Some(readers) = rows.checked_sub(first).filter(|&readers| readers > 0) else { continue };
                    let d_products = &products[at * count + index].1;
                    let mut factors = [T::ZERO; CHUNK];
                    for (factor, i) in factors.iter_mut().zip(first..rows) {
                        *factor = d_products[i * width + j];
                    }
                    let (from, own) = ((first - j - early) * d, first * d);
                    verbs.add_scaled(&mut gathered[from..][..readers * d], &read.rows[own..], d, &factors);
                    verbs.add_scaled(&mut d_read[own..][..readers * d], &self.faded[from..], d, &factors);
                }
                verbs.gather_faded(gathered, d, &self.factors[j * d..][..len]);
                verbs.add_outer(&mut d_source[j * d..][..d], d, &[T::ONE], &gathered[..d]);
                verbs.add_products(&mut d_log[(j + 1) * d..], &self.faded[d..len], &gathered[d..]);
            }
        }
    }
}

/// Rows, as they are and under their decay.
#[derive(Clone, Copy)]
pub struct FadedRows<'a, T> {
    pub rows: &'a [T],
    pub faded: &'a [T],
}

/// A chunk on the way back: rows with the gradients of the rows under their decays, which become those of the rows.
pub struct FadeGradient<'a, T> {
    pub reads: &'a mut [(FadedRows<'a, T>, &'a mut [T], Reach)],
    pub sources: &'a mut [(FadedRows<'a, T>, &'a mut [T])],
    /// Σ_e S ⊙ its gradient behind the chunk, per channel.
    pub state: &'a [T],
    /// Of each reading with each added row: the products and their gradients.
    pub products: &'a mut [(&'a [T], &'a mut [T])],
}
