//! Line charts as SVG: a line with points per series.

use std::ops::Range;

use plotters::coord::ranged1d::{AsRangedCoord, ValueFormatter};
use plotters::prelude::*;

const SIZE: (u32, u32) = (900, 600);
const FONT: &str = "sans-serif";

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Scale {
    /// From 0, or the smallest value if that is negative
    Linear,
    /// Logarithmic, with ticks at powers of a base
    Log(f64),
}

pub struct Axis<'a> {
    /// With the unit
    pub name: &'a str,
    pub scale: Scale,
}

impl<'a> Axis<'a> {
    pub fn linear(name: &'a str) -> Self {
        Self { name, scale: Scale::Linear }
    }

    pub fn log(name: &'a str, base: f64) -> Self {
        Self { name, scale: Scale::Log(base) }
    }

    /// From the smallest to the largest value with a margin.
    fn range(&self, values: impl Iterator<Item = f64> + Clone) -> Range<f64> {
        let smallest = values.clone().fold(f64::INFINITY, f64::min);
        let largest = values.fold(f64::NEG_INFINITY, f64::max);
        match self.scale {
            Scale::Linear => smallest.min(0.0)..largest * 1.05,
            Scale::Log(base) => smallest / base.powf(0.15)..largest * base.powf(0.15),
        }
    }
}

pub struct Series {
    pub name: String,
    pub colour: RGBColor,
    pub points: Vec<(f64, f64)>,
}

impl Series {
    /// In the colour of the mechanism that the name begins with.
    pub fn new(name: impl Into<String>, points: Vec<(f64, f64)>) -> Self {
        let name = name.into();
        let mechanism = name.split_once([' ', ',']).map_or(&*name, |(first, _)| first);
        let index = COLOURS.iter().position(|(of, _)| *of == mechanism).unwrap_or(COLOURS.len() - 1);
        Self { colour: COLOURS[index].1, name, points }
    }

    /// In the colour of a number, for series that are not mechanisms.
    pub fn numbered(index: usize, name: String, points: Vec<(f64, f64)>) -> Self {
        Self { name, colour: COLOURS[index % COLOURS.len()].1, points }
    }
}

pub struct Chart<'a> {
    pub title: &'a str,
    pub x: Axis<'a>,
    pub y: Axis<'a>,
    pub legend: SeriesLabelPosition,
}

/// Colours that remain distinct to the colour-blind (Okabe and Ito; Tol for recurrent layers), and grey.
const COLOURS: [(&str, RGBColor); 20] = [
    ("softmax", RGBColor(0, 0, 0)),
    ("linear", RGBColor(0, 114, 178)),
    ("performer", RGBColor(213, 94, 0)),
    ("norm", RGBColor(86, 180, 233)),
    ("transnormer", RGBColor(150, 140, 0)),
    ("retention", RGBColor(0, 158, 115)),
    ("diag", RGBColor(204, 121, 167)),
    ("flash", RGBColor(230, 159, 0)),
    ("gla", RGBColor(51, 34, 136)),
    ("deltanet", RGBColor(136, 34, 85)),
    ("gated_deltanet", RGBColor(170, 68, 153)),
    ("kda", RGBColor(204, 102, 119)),
    ("mamba2", RGBColor(68, 170, 153)),
    ("mamba", RGBColor(0, 85, 90)),
    ("lightning", RGBColor(17, 119, 51)),
    ("rwkv7", RGBColor(136, 204, 238)),
    ("s4d", RGBColor(153, 153, 51)),
    ("lru", RGBColor(187, 85, 102)),
    ("hybrid", RGBColor(221, 204, 119)),
    ("", RGBColor(130, 130, 130)),
];

impl Chart<'_> {
    /// The SVG.
    ///
    /// # Errors
    /// If there is no point, and those of the drawing library.
    pub fn draw(&self, series: &[Series]) -> Result<String, String> {
        if series.iter().all(|series| series.points.is_empty()) {
            return Err(format!("cannot draw {}: no points", self.title));
        }
        let mut svg = String::new();
        self.draw_into(&mut svg, series).map_err(|error| format!("cannot draw {}: {error}", self.title))?;
        Ok(svg)
    }

    fn draw_into<'s>(&self, svg: &'s mut String, series: &[Series]) -> Result<(), Box<dyn std::error::Error + 's>> {
        let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
        root.fill(&WHITE)?;
        let points = series.iter().flat_map(|series| &series.points);
        let (x, y) =
            (self.x.range(points.clone().map(|point| point.0)), self.y.range(points.clone().map(|point| point.1)));
        match (self.x.scale, self.y.scale) {
            (Scale::Linear, Scale::Linear) => self.plot(&root, x, y, series)?,
            (Scale::Linear, Scale::Log(base)) => self.plot(&root, x, y.log_scale().base(base), series)?,
            (Scale::Log(base), Scale::Linear) => self.plot(&root, x.log_scale().base(base), y, series)?,
            (Scale::Log(x_base), Scale::Log(y_base)) => {
                self.plot(&root, x.log_scale().base(x_base), y.log_scale().base(y_base), series)?;
            }
        }
        root.present()?;
        Ok(())
    }

    fn plot<'s, X, Y>(
        &self,
        root: &DrawingArea<SVGBackend<'s>, plotters::coord::Shift>,
        x: X,
        y: Y,
        series: &[Series],
    ) -> Result<(), Box<dyn std::error::Error + 's>>
    where
        X: AsRangedCoord<Value = f64>,
        Y: AsRangedCoord<Value = f64>,
        X::CoordDescType: ValueFormatter<f64>,
        Y::CoordDescType: ValueFormatter<f64>,
    {
        let mut chart = ChartBuilder::on(root)
            .caption(self.title, (FONT, 18))
            .margin(15)
            .x_label_area_size(45)
            .y_label_area_size(70)
            .build_cartesian_2d(x, y)?;
        chart
            .configure_mesh()
            .x_desc(self.x.name)
            .y_desc(self.y.name)
            .axis_desc_style((FONT, 16))
            .label_style((FONT, 14))
            .x_label_formatter(&tick)
            .y_label_formatter(&tick)
            .light_line_style(BLACK.mix(0.05))
            .bold_line_style(BLACK.mix(0.15))
            .draw()?;
        for Series { name, colour, points } in series {
            let colour = *colour;
            chart
                .draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(2)))?
                .label(name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], colour.stroke_width(3)));
            chart.draw_series(points.iter().map(|&point| Circle::new(point, 3, colour.filled())))?;
        }
        chart
            .configure_series_labels()
            .position(self.legend.clone())
            .background_style(WHITE.mix(0.85))
            .border_style(BLACK.mix(0.3))
            .label_font((FONT, 15))
            .draw()?;
        Ok(())
    }
}

/// Four significant digits, without trailing zeros.
fn tick(value: &f64) -> String {
    let digits = (3 - value.abs().max(1e-12).log10().floor() as i32).clamp(0, 9) as usize;
    let text = format!("{value:.digits$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').into() } else { text }
}
