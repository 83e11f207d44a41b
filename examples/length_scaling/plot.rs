//! The picture: time over length, both logarithmic, a line per mechanism.

use std::ops::Range;

use plotters::prelude::*;

use crate::common::Mechanism;
use crate::scaling::{Record, by_mechanism};

const SIZE: (u32, u32) = (900, 600);
const FONT: &str = "sans-serif";

/// Colours that remain distinct to the colour-blind (Okabe and Ito).
fn colour(mechanism: Mechanism) -> RGBColor {
    match mechanism {
        Mechanism::Softmax => RGBColor(0, 0, 0),
        Mechanism::Linear => RGBColor(0, 114, 178),
        Mechanism::Performer => RGBColor(213, 94, 0),
        Mechanism::Norm => RGBColor(86, 180, 233),
        Mechanism::Retention => RGBColor(0, 158, 115),
        Mechanism::Diag => RGBColor(204, 121, 167),
        Mechanism::Gau => RGBColor(130, 130, 130),
        Mechanism::Flash => RGBColor(230, 159, 0),
    }
}

/// The SVG.
///
/// # Errors
/// Those of the drawing library.
pub fn draw(title: &str, records: &[Record]) -> Result<String, String> {
    let mut svg = String::new();
    draw_into(&mut svg, title, records).map_err(|error| format!("cannot draw the picture: {error}"))?;
    Ok(svg)
}

fn draw_into(svg: &mut String, title: &str, records: &[Record]) -> Result<(), Box<dyn std::error::Error>> {
    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let lengths = range(records.iter().map(|record| record.len as f64), 1.1);
    let times = range(records.iter().map(|record| record.median_ms), 1.5);
    let mut chart = ChartBuilder::on(&root)
        .caption(title, (FONT, 18))
        .margin(15)
        .x_label_area_size(45)
        .y_label_area_size(70)
        .build_cartesian_2d(lengths.log_scale().base(2.0), times.log_scale())?;
    chart
        .configure_mesh()
        .x_desc("length (tokens)")
        .y_desc("median time (ms)")
        .axis_desc_style((FONT, 16))
        .label_style((FONT, 14))
        .x_label_formatter(&|length| format!("{length:.0}"))
        .y_label_formatter(&|time| time.to_string())
        .light_line_style(BLACK.mix(0.05))
        .bold_line_style(BLACK.mix(0.15))
        .draw()?;
    for (mechanism, records) in by_mechanism(records) {
        let (colour, points) =
            (colour(mechanism), || records.iter().map(|record| (record.len as f64, record.median_ms)));
        chart
            .draw_series(LineSeries::new(points(), colour.stroke_width(2)))?
            .label(mechanism.name())
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], colour.stroke_width(3)));
        chart.draw_series(points().map(|point| Circle::new(point, 3, colour.filled())))?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.85))
        .border_style(BLACK.mix(0.3))
        .label_font((FONT, 15))
        .draw()?;
    root.present()?;
    Ok(())
}

/// From the smallest to the largest value, widened by a factor at both ends.
fn range(values: impl Iterator<Item = f64> + Clone, margin: f64) -> Range<f64> {
    let smallest = values.clone().fold(f64::INFINITY, f64::min);
    let largest = values.fold(0.0, f64::max);
    smallest / margin..largest * margin
}
