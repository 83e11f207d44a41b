//! Gradients where there are fewer heads than threads: blocks of columns walk back apart, through a window of segments at a
//! time; then each segment takes the gradients of its rows from the sums of all blocks.

use std::ops::Range;

use super::super::buffer::Buffer;
use super::super::parallel;
use super::super::rows::Number;
use super::backward::Task;
use super::chunk::Chunk;
use super::gradient::{ChunkGradient, RowGradients};
use super::operands::{Group, Operands, Segment};
use super::strips::{Kept, Room, Strip, blocks};
use super::walk::Walk;
use super::{CHUNK, Context, DeltaSaved, StateHead};

/// Segments of a window.
const WINDOW: usize = 16;

/// The gradients of all groups.
pub fn in_strips<T: Number>(context: &Context<'_, T>, saved: &DeltaSaved<'_>, mut tasks: Vec<Task<'_>>) {
    let shapes = context.shapes();
    let ranges: Vec<Range<usize>> = blocks(shapes.value_width).collect();
    let strips: Vec<_> =
        ranges.iter().map(|block| Strip::new(context.problem, context.inputs, block.clone())).collect();
    let blocks: Vec<_> =
        strips.iter().map(|strip| Block { context: strip.context(context.verbs), saved: strip.saved(saved) }).collect();
    let Some(task) = tasks.first() else { return };
    let (heads, segments) = (task.group.heads.len(), task.tokens());
    let head = |index| StateHead { batch: index / shapes.state_heads(), head: index % shapes.state_heads() };
    let all =
        (0..shapes.batch * shapes.state_heads()).flat_map(|index| (0..ranges.len()).map(move |block| (index, block)));
    let mut columns: Vec<_> = all.map(|(index, block)| Columns::new(block, head(index))).collect();
    each(&blocks, &mut columns, |walk, block, columns| columns.start(walk, block, &segments));
    for first in (0..segments.len()).step_by(WINDOW).rev() {
        let window = &segments[first..(first + WINDOW).min(segments.len())];
        each(&blocks, &mut columns, |walk, block, columns| columns.window(walk, block, (window, first)));
        let parts = tasks.iter_mut().flat_map(|task| {
            let group = &task.group;
            task.segments[first..][..window.len()].iter_mut().map(move |segment| (group, segment))
        });
        let heads_of = |group: &Group| {
            let first = group.at(0);
            let index = (first.batch * shapes.state_heads() + first.head) * ranges.len();
            columns[index..].chunks(ranges.len())
        };
        parallel::run(
            parts.collect(),
            || Join::new(context, heads),
            |join, (group, segment)| join.run(context, (group, heads_of(group)), segment, (&ranges, window[0].start)),
        );
    }
    let mut columns = columns.iter();
    for room in tasks.into_iter().flat_map(|task| task.state) {
        for (mut room, columns) in Room::cut(room, shapes.width, &ranges).into_iter().zip(&mut columns) {
            let context = &blocks[columns.block].context;
            room.store(&columns.d_state, context.padded().1, context.shapes().value_width, 0);
        }
    }
}

/// The problem on a block of columns.
struct Block<'a, T: 'static> {
    context: Context<'a, T>,
    saved: DeltaSaved<'a>,
}

/// Works on all columns side by side.
fn each<T: Number>(
    blocks: &[Block<'_, T>],
    columns: &mut [Columns<T>],
    work: impl Fn(&mut Walk<T>, &Block<'_, T>, &mut Columns<T>) + Sync,
) {
    let width = |columns: &Columns<T>| blocks[columns.block].context.padded().1;
    let mut columns: Vec<_> = columns.iter_mut().collect();
    // Those taken last come first.
    columns.sort_by_key(|columns| width(columns));
    parallel::run(columns, Kept::none, |kept, columns| {
        let block = &blocks[columns.block];
        work(kept.get(width(columns), || Walk::new(&block.context)), block, columns);
    });
}

/// What the columns of a chunk give to the gradients of its rows, and the gradients of its values.
struct Partial<T> {
    rows: RowGradients<T>,
    values: Buffer<T>,
}

impl<T: Number> Partial<T> {
    fn new(context: &Context<'_, T>, chunk: &Chunk<T>) -> Self {
        Self { rows: RowGradients::new(context, chunk), values: Buffer::zeros(CHUNK * context.padded().1) }
    }
}

/// A block of columns of a state head on its way back.
struct Columns<T> {
    block: usize,
    at: StateHead,
    /// At the start of each segment.
    starts: Vec<Buffer<T>>,
    d_state: Buffer<T>,
    /// Of each chunk of a window.
    partials: Vec<Partial<T>>,
}

impl<T: Number> Columns<T> {
    fn new(block: usize, at: StateHead) -> Self {
        Self { block, at, starts: Vec::new(), d_state: Buffer::zeros(0), partials: Vec::new() }
    }

    fn start(&mut self, walk: &mut Walk<T>, block: &Block<'_, T>, segments: &[Range<usize>]) {
        self.starts = walk.starts(&block.context, self.at, segments);
        self.d_state = Buffer::zeros(block.context.state_len());
        block.context.load_state(block.saved.d_state.as_ref(), self.at, &mut self.d_state);
    }

    /// Walks back through a window, whose first segment is given with its index.
    fn window(&mut self, walk: &mut Walk<T>, block: &Block<'_, T>, (window, first): (&[Range<usize>], usize)) {
        let Self { at, starts, d_state, partials, .. } = self;
        let context = &block.context;
        for (segment, start) in window.iter().zip(&starts[first..]).rev() {
            walk.segment(context, &block.saved.d_out, *at, (segment, start), d_state, |chunk, gradient, tokens| {
                let index = (tokens.start - window[0].start) / CHUNK;
                if partials.len() <= index {
                    partials.resize_with(index + 1, || Partial::new(context, chunk));
                }
                partials[index].rows.copy_from(&gradient.rows);
                partials[index].values.copy_from_slice(gradient.values.last().expect("at least one"));
            });
        }
    }
}

/// Joins the columns of a segment.
struct Join<T> {
    chunk: Chunk<T>,
    gradient: ChunkGradient<T>,
    operands: Operands<T>,
}

impl<T: Number> Join<T> {
    fn new(context: &Context<'_, T>, heads: usize) -> Self {
        let chunk = Chunk::new(context);
        Self { gradient: ChunkGradient::new(context, &chunk), operands: Operands::new(context, heads), chunk }
    }

    fn run<'c>(
        &mut self,
        context: &Context<'_, T>,
        (group, heads): (&Group, impl Iterator<Item = &'c [Columns<T>]>),
        segment: &mut Segment<'_>,
        (blocks, first): (&[Range<usize>], usize),
    ) {
        let Self { chunk, gradient, operands } = self;
        operands.clear();
        for (own, columns) in heads.take(group.heads.len()).enumerate() {
            for tokens in segment.chunks().rev() {
                chunk.load(context, group.at(own), tokens.clone(), true);
                let index = (tokens.start - first) / CHUNK;
                for (block, columns) in columns.iter().enumerate() {
                    let partial = &columns.partials[index];
                    if block == 0 {
                        gradient.rows.copy_from(&partial.rows);
                    } else {
                        gradient.rows.add(context.verbs, &partial.rows);
                    }
                    let values = gradient.values.last_mut().expect("at least one");
                    join_rows(values, context.padded().1, &partial.values, &blocks[block]);
                }
                gradient.rows(context, chunk, group.at(own));
                operands.add(context, (chunk, gradient), (group, own), &tokens, segment);
            }
        }
        operands.store(segment);
    }
}

/// Puts the columns of a tile in their place.
fn join_rows<T: Copy>(into: &mut [T], padded: usize, tile: &[T], columns: &Range<usize>) {
    let rows = tile.chunks_exact(tile.len() / CHUNK);
    for (to, row) in into.chunks_exact_mut(padded).zip(rows) {
        to[columns.clone()].copy_from_slice(&row[..columns.len()]);
    }
}
