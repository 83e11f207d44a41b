//! Rows cut into columns of channels, so that each task has its own.

use std::ops::Range;

/// Rows of some channels, to be written.
pub enum Columns<'a, T> {
    /// All channels of the rows, which lie together.
    Whole(&'a mut [T], usize),
    Parts(Vec<&'a mut [T]>),
}

impl<'a, T> Columns<'a, T> {
    /// The rows of `all`, of `channels` numbers, cut into groups of `steps` rows and these into columns of at most `width`
    /// channels: group by group, column by column. Groups have a step, rows a channel at least.
    pub fn cut(all: &'a mut [T], steps: usize, channels: usize, width: usize) -> Vec<Self> {
        let groups = all.chunks_mut(steps * channels);
        if channels <= width {
            return groups.map(|group| Self::Whole(group, channels)).collect();
        }
        groups
            .flat_map(|group| {
                let mut columns: Vec<Vec<&mut [T]>> =
                    (0..channels.div_ceil(width)).map(|_| Vec::with_capacity(steps)).collect();
                for row in group.chunks_mut(channels) {
                    columns.iter_mut().zip(row.chunks_mut(width)).for_each(|(column, part)| column.push(part));
                }
                columns.into_iter().map(Self::Parts)
            })
            .collect()
    }

    pub fn row(&mut self, index: usize) -> &mut [T] {
        match self {
            Self::Whole(rows, channels) => &mut rows[index * *channels..][..*channels],
            Self::Parts(rows) => rows[index],
        }
    }

    /// One row to be read, another to be written.
    pub fn pair(&mut self, read: usize, written: usize) -> (&[T], &mut [T]) {
        let (low, high) = (read.min(written), read.max(written));
        let (low, high): (&mut [T], &mut [T]) = match self {
            Self::Whole(rows, channels) => {
                let (head, tail) = rows.split_at_mut(high * *channels);
                (&mut head[low * *channels..][..*channels], &mut tail[..*channels])
            }
            Self::Parts(rows) => {
                let (head, tail) = rows.split_at_mut(high);
                (head[low], tail[0])
            }
        };
        if read < written { (low, high) } else { (high, low) }
    }
}

/// The channels of each column.
pub fn ranges(channels: usize, width: usize) -> impl Iterator<Item = Range<usize>> {
    (0..channels).step_by(width).map(move |start| start..(start + width).min(channels))
}
