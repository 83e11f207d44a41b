//! Pictures of times: time over length, both logarithmic, as lines.

use std::ops::Range;

use plotters::prelude::*;

const SIZE: (u32, u32) = (900, 600);
const FONT: &str = "sans-serif";

/// Colours that remain distinct to the colour-blind (Okabe and Ito), and grey.
pub const COLOURS: [RGBColor; 8] = [
    RGBColor(0, 0, 0),
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(86, 180, 233),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(130, 130, 130),
    RGBColor(230, 159, 0),
];

pub struct Line {
    pub name: String,
    pub colour: RGBColor,
    /// Length and milliseconds.
    pub points: Vec<(f64, f64)>,
}

/// The SVG.
///
/// # Errors
/// Those of the drawing library.
pub fn draw(title: &str, x: &str, y: &str, lines: &[Line]) -> Result<String, String> {
    let mut svg = String::new();
    draw_into(&mut svg, title, [x, y], lines).map_err(|error| format!("cannot draw the picture: {error}"))?;
    Ok(svg)
}

fn draw_into(svg: &mut String, title: &str, axes: [&str; 2], lines: &[Line]) -> Result<(), Box<dyn std::error::Error>> {
    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let points = || lines.iter().flat_map(|line| &line.points);
    let lengths = range(points().map(|point| point.0), 1.1);
    let times = range(points().map(|point| point.1), 1.5);
    let mut chart = ChartBuilder::on(&root)
        .caption(title, (FONT, 18))
        .margin(15)
        .x_label_area_size(45)
        .y_label_area_size(70)
        .build_cartesian_2d(lengths.log_scale().base(2.0), times.log_scale())?;
    chart
        .configure_mesh()
        .x_desc(axes[0])
        .y_desc(axes[1])
        .axis_desc_style((FONT, 16))
        .label_style((FONT, 14))
        .x_label_formatter(&|length| format!("{length:.0}"))
        .y_label_formatter(&|time| time.to_string())
        .light_line_style(BLACK.mix(0.05))
        .bold_line_style(BLACK.mix(0.15))
        .draw()?;
    for Line { name, colour, points } in lines {
        let colour = *colour;
        chart
            .draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(2)))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], colour.stroke_width(3)));
        chart.draw_series(points.iter().map(|&point| Circle::new(point, 3, colour.filled())))?;
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
