//! The picture: a line per mechanism.

use crate::common::Mechanism;
use crate::common::plot::{self, COLOURS, Line};
use crate::scaling::{Record, by_mechanism};

/// The SVG.
///
/// # Errors
/// Those of the drawing library.
pub fn draw(title: &str, records: &[Record]) -> Result<String, String> {
    let line = |(mechanism, records): (Mechanism, &[Record])| Line {
        name: mechanism.name().into(),
        // A mechanism has its colour, whichever others are there.
        colour: COLOURS[mechanism as usize],
        points: records.iter().map(|record| (record.len as f64, record.median_ms)).collect(),
    };
    let lines: Vec<_> = by_mechanism(records).map(line).collect();
    plot::draw(title, "length (tokens)", "median time (ms)", &lines)
}
