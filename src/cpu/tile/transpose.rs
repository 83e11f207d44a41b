//! Row-major tiles into column panels of their transpose.

/// Writes the transpose of `rows` × `width` numbers as panels: row j of `from` becomes column j, and `into` holds for
/// every `panel` columns their `width` rows of numbers, the last panel filled up with zeros.
pub fn transpose<X: Copy + Default>(into: &mut [X], from: &[X], row: usize, rows: usize, width: usize, panel: usize) {
    for (index, columns) in into[..rows.div_ceil(panel) * panel * width].chunks_exact_mut(panel * width).enumerate() {
        let first = index * panel;
        let count = (rows - first).min(panel);
        if count < panel {
            columns.fill(X::default());
        }
        let mut p = 0;
        while p < width {
            // Eight columns of eight rows at a time keep both sides in few cache lines.
            let depth = (width - p).min(8);
            for j in 0..count {
                let source = &from[(first + j) * row + p..][..depth];
                for (d, &x) in source.iter().enumerate() {
                    columns[(p + d) * panel + j] = x;
                }
            }
            p += depth;
        }
    }
}
