//! Printed tables.

use comfy_table::{CellAlignment, Table, presets};

/// A table whose columns after the first `left` are aligned to the right.
pub fn table(header: &[&str], left: usize) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_BORDERS_ONLY).set_header(header);
    table.column_iter_mut().skip(left).for_each(|column| column.set_cell_alignment(CellAlignment::Right));
    table
}
