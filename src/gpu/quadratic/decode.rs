//! Few queries of several heads that share keys.

use super::QuadraticLayout;
use crate::problem::{Mask, Quadratic, QuadraticShapes};

/// Most rows that the queries of a key head are folded into.
const ROWS: usize = 128;

/// The same computation with the query heads of a key head as rows of one head, so that keys and values are read once for
/// all of them. None if they are too many, do not lie as rows, or do not see all keys.
pub(super) fn folded(problem: &Quadratic, layout: &QuadraticLayout) -> Option<(Quadratic, QuadraticLayout)> {
    let shapes = problem.shapes.clone();
    let group = shapes.heads.checked_div(shapes.key_heads)?;
    let queries = group * shapes.queries;
    let sees_all = |position: i64| problem.mask.visible(position, shapes.keys) == (0..shapes.keys);
    let [batch, head, row] = layout.q;
    let are_rows = shapes.queries == 1 || head == shapes.queries as i64 * row;
    if group < 2 || queries > ROWS || shapes.queries == 0 || shapes.bias.is_some() || !are_rows {
        return None;
    }
    let last = shapes.keys as i64 - 1;
    if !sees_all(last) || !sees_all(last + 1 - shapes.queries as i64) {
        return None;
    }
    let shapes = QuadraticShapes { heads: shapes.key_heads, queries, ..shapes };
    let row = if queries == group { head } else { row };
    let layout = QuadraticLayout { q: [batch, group as i64 * head, row], ..*layout };
    Some((Quadratic { shapes, mask: Mask::Full, ..problem.clone() }, layout))
}
