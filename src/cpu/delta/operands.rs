//! Gradients of the operands in a segment, added up over the state heads that share them.

use std::ops::Range;

use super::super::buffer::Buffer;
use super::super::rows::{Number, store_rows};
use super::super::tile::Verbs;
use super::chunk::Chunk;
use super::gradient::ChunkGradient;
use super::{CHUNK, Context, SEGMENT, StateHead};
use crate::problem::{DeltaDecay, RankOne, SliceMut};

/// State heads that share operands.
#[derive(Clone)]
pub struct Group {
    pub batch: usize,
    pub heads: Range<usize>,
}

impl Group {
    /// A head of the group.
    pub fn at(&self, own: usize) -> StateHead {
        StateHead { batch: self.batch, head: self.heads.start + own }
    }
}

/// Tokens with room for their gradients, per head of each operand.
pub struct Segment<'o> {
    pub tokens: Range<usize>,
    pub q: Vec<SliceMut<'o>>,
    pub k: Vec<SliceMut<'o>>,
    pub v: Vec<SliceMut<'o>>,
    pub rank_one: RankOne<Vec<SliceMut<'o>>>,
    pub log_decay: Option<Vec<SliceMut<'o>>>,
    /// What these tokens give to the gradient of the bonus; empty where that is not asked for.
    pub bonus: &'o mut [f64],
}

impl Segment<'_> {
    pub fn chunks(&self) -> impl DoubleEndedIterator<Item = Range<usize>> + ExactSizeIterator + use<> {
        chunks(&self.tokens)
    }
}

/// The chunks of a segment.
pub fn chunks(tokens: &Range<usize>) -> impl DoubleEndedIterator<Item = Range<usize>> + ExactSizeIterator + use<> {
    let end = tokens.end;
    tokens.clone().step_by(CHUNK).map(move |start| start..(start + CHUNK).min(end))
}

/// Gradients of a segment's rows of an operand, for some heads that are added to by several state heads.
struct Sums<T> {
    heads: Vec<Buffer<T>>,
    padded: usize,
    width: usize,
}

impl<T: Number> Sums<T> {
    fn new(context: &Context<'_, T>, heads: usize, width: usize) -> Self {
        let padded = context.verbs.padded(width);
        Self { heads: (0..heads).map(|_| Buffer::zeros(SEGMENT * padded)).collect(), padded, width }
    }

    fn clear(&mut self) {
        self.heads.iter_mut().for_each(|head| head.fill(T::ZERO));
    }

    /// Adds to rows of the head that `index` of `count` heads share.
    fn add(&mut self, verbs: &Verbs<T>, [index, count]: [usize; 2], rows: &Range<usize>, by: &[T]) {
        let head = index * self.heads.len() / count;
        let to = &mut self.heads[head][rows.start * self.padded..rows.end * self.padded];
        verbs.add_outer(to, by.len(), &[T::ONE], by);
    }

    fn store(&self, rooms: &mut [SliceMut<'_>], rows: usize) {
        for (head, room) in self.heads.iter().zip(rooms) {
            store_rows(&head[..rows * self.padded], self.padded, self.width, room, 0);
        }
    }
}

/// The sums of a segment.
pub struct Operands<T> {
    q: Sums<T>,
    k: Sums<T>,
    v: Sums<T>,
    rank_one: RankOne<Sums<T>>,
    /// State heads of a group.
    heads: usize,
}

impl<T: Number> Operands<T> {
    pub fn new(context: &Context<'_, T>, heads: usize) -> Self {
        let shapes = context.shapes();
        let sums = |count: usize, width| Sums::new(context, count * heads / shapes.state_heads(), width);
        let keys = || sums(shapes.key_heads, shapes.width);
        Self {
            q: sums(shapes.query_heads, shapes.width),
            k: keys(),
            v: sums(shapes.value_heads, shapes.value_width),
            rank_one: match shapes.rank_one {
                RankOne::Free { .. } => RankOne::Free { a: keys(), b: keys() },
                _ => RankOne::None,
            },
            heads,
        }
    }

    pub fn clear(&mut self) {
        [&mut self.q, &mut self.k, &mut self.v].into_iter().for_each(Sums::clear);
        if let RankOne::Free { a, b } = &mut self.rank_one {
            [a, b].into_iter().for_each(Sums::clear);
        }
    }

    pub fn store(&self, segment: &mut Segment<'_>) {
        let rows = segment.tokens.len();
        self.q.store(&mut segment.q, rows);
        self.k.store(&mut segment.k, rows);
        self.v.store(&mut segment.v, rows);
        if let (RankOne::Free { a, b }, RankOne::Free { a: room_a, b: room_b }) =
            (&self.rank_one, &mut segment.rank_one)
        {
            a.store(room_a, rows);
            b.store(room_b, rows);
        }
    }

    /// Adds the gradients of a chunk of the group's head `own` to those of the operands.
    pub fn add(
        &mut self,
        context: &Context<'_, T>,
        (chunk, gradient): (&Chunk<T>, &mut ChunkGradient<T>),
        (group, own): (&Group, usize),
        tokens: &Range<usize>,
        segment: &mut Segment<'_>,
    ) {
        let Self { q, k, v, rank_one, heads } = self;
        let (verbs, (d, e), readers) = (context.verbs, context.padded(), context.readers());
        let (rows, len, first) = (tokens.len(), tokens.len() * d, tokens.start - segment.tokens.start);
        let at = first..first + rows;
        let (reads, sources) = (&mut gradient.rows.reads, &mut gradient.rows.sources);
        for (reader, d_rows) in reads[..readers].iter_mut().enumerate() {
            let (factors, scale) = (&chunk.factors[reader], context.problem.scale);
            normalized(context, &chunk.reads[reader].rows[..len], &mut d_rows[..len], factors, scale);
            q.add(verbs, [own * readers + reader, *heads * readers], &at, &d_rows[..len]);
        }
        let mut kept = [T::ONE; CHUNK];
        for (kept, token) in kept.iter_mut().zip(tokens.clone()) {
            *kept = if context.keeps(group.batch, token) { T::ONE } else { T::ZERO };
        }
        let head = [own, *heads];
        let d_values = &mut gradient.values.last_mut().expect("at least one")[..rows * e];
        verbs.scale_rows(d_values, e, &kept);
        v.add(verbs, head, &at, d_values);
        reads[readers..].iter_mut().chain(&mut *sources).for_each(|rows| verbs.scale_rows(&mut rows[..len], d, &kept));
        let (d_keys, keys) = match (rank_one, &mut segment.rank_one) {
            (RankOne::Free { a, b }, _) => {
                a.add(verbs, head, &at, &sources[0][..len]);
                b.add(verbs, head, &at, &reads[readers][..len]);
                (&mut sources[1], &chunk.sources[1].rows)
            }
            (_, RankOne::Rule { beta }) => {
                // a is β k, b is k.
                let mut d_beta = [T::ZERO; CHUNK];
                let (keys, d_keys) = (&chunk.reads[readers].rows, &mut reads[readers]);
                verbs.row_pair_products(&sources[0][..len], &keys[..len], d, &mut d_beta[..rows]);
                T::store(&d_beta[..rows], &mut beta[own], first);
                verbs.add_scaled(&mut d_keys[..len], &sources[0], d, &chunk.beta);
                (d_keys, keys)
            }
            _ => (&mut sources[0], &chunk.sources[0].rows),
        };
        normalized(context, &keys[..len], &mut d_keys[..len], &chunk.factors[readers], 1.0);
        k.add(verbs, head, &at, &d_keys[..len]);
        let width = context.shapes().width;
        if let (Some(bonus), false) = (&chunk.bonus, segment.bonus.is_empty()) {
            for (sum, x) in segment.bonus[own * width..].iter_mut().zip(&bonus.gradient[..width]) {
                *sum += x.to_f64();
            }
        }
        let Some(room) = &mut segment.log_decay else { return };
        if context.shapes().decay == DeltaDecay::Channel {
            let rows = &mut gradient.log_decay[..len];
            verbs.scale_rows(rows, d, &kept);
            store_rows(rows, d, width, &mut room[own], first);
        } else {
            let rows = &mut gradient.log_decay[..rows];
            rows.iter_mut().zip(kept).for_each(|(x, kept)| *x = *x * kept);
            T::store(rows, &mut room[own], first);
        }
    }
}

/// Gradients of rows that were multiplied with `factors`, which hold their norms if the problem has it so, and `scale`.
fn normalized<T: Number>(context: &Context<'_, T>, rows: &[T], d_rows: &mut [T], factors: &[T], scale: f64) {
    let (verbs, (d, _)) = (context.verbs, context.padded());
    if context.problem.normalize.is_some() && scale != 0.0 {
        let mut products = [T::ZERO; CHUNK];
        verbs.row_pair_products(rows, d_rows, d, &mut products);
        let inverse = T::from_f64(-1.0 / (scale * scale));
        products.iter_mut().for_each(|product| *product = *product * inverse);
        verbs.add_scaled(d_rows, rows, d, &products);
    }
    verbs.scale_rows(d_rows, d, factors);
}
