//! The picture: time over length, both logarithmic, a line per mechanism.

use plotters::prelude::SeriesLabelPosition;

use crate::common::chart::{Axis, Chart, Series};
use crate::scaling::{Record, by_mechanism};

/// The SVG.
///
/// # Errors
/// Those of the drawing library.
pub fn draw(title: &str, records: &[Record]) -> Result<String, String> {
    let chart = Chart {
        title,
        x: Axis::log("length (tokens)", 2.0),
        y: Axis::log("median time (ms)", 10.0),
        legend: SeriesLabelPosition::UpperLeft,
    };
    let points = |records: &[Record]| records.iter().map(|record| (record.len as f64, record.median_ms)).collect();
    let series = by_mechanism(records).map(|(mechanism, records)| Series::new(mechanism.name(), points(records)));
    chart.draw(&series.collect::<Vec<_>>())
}
