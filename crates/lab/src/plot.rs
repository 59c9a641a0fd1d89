//! Plots as SVG text: curves and heat maps, for reports and result pages.

use plotters::prelude::*;

/// Why a plot could not be drawn.
#[derive(Debug, thiserror::Error)]
#[error("the plot `{title}` cannot be drawn: {why}")]
pub struct PlotError {
    title: String,
    why: String,
}

fn failed<E: std::fmt::Display>(title: &str) -> impl Fn(E) -> PlotError + '_ {
    move |e| PlotError {
        title: title.to_string(),
        why: e.to_string(),
    }
}

/// A named line through points, `x` ascending.
#[derive(Debug, Clone, PartialEq)]
pub struct Curve {
    /// Shown in the legend.
    pub name: String,
    /// `(x, y)`.
    pub points: Vec<(f64, f64)>,
}

/// Colours that can be told apart by most people, also in grey (Okabe and Ito).
const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(90, 90, 90),
];

/// Curves over common axes. `x` and `y` are the names of the axes, with units. Points that are not finite are left out.
///
/// # Errors
/// When the drawing library fails.
pub fn curves(title: &str, (x, y): (&str, &str), curves: &[Curve]) -> Result<String, PlotError> {
    let finite = |p: &&(f64, f64)| p.0.is_finite() && p.1.is_finite();
    let all = || curves.iter().flat_map(|c| &c.points).filter(finite);
    let range = |values: &mut dyn Iterator<Item = f64>, zero: bool| {
        let start = if zero {
            (0.0, 1e-9)
        } else {
            (f64::INFINITY, f64::NEG_INFINITY)
        };
        let (lo, hi) = values.fold(start, |(lo, hi), v| (lo.min(v), hi.max(v)));
        let pad = ((hi - lo) * 0.04).max(1e-9);
        if lo > hi {
            0.0..1.0
        } else {
            (if zero { lo } else { lo - pad })..hi + pad
        }
    };
    let xs = range(&mut all().map(|p| p.0), false);
    let ys = range(&mut all().map(|p| p.1), true);
    let (middle_x, middle_y) = (f64::midpoint(xs.start, xs.end), f64::midpoint(ys.start, ys.end));
    let points_in = |right: bool, upper: bool| {
        all()
            .filter(|p| (p.0 > middle_x) == right && (p.1 > middle_y) == upper)
            .count()
    };
    let emptiest = [
        (SeriesLabelPosition::UpperRight, points_in(true, true)),
        (SeriesLabelPosition::LowerRight, points_in(true, false)),
        (SeriesLabelPosition::UpperLeft, points_in(false, true)),
        (SeriesLabelPosition::LowerLeft, points_in(false, false)),
    ]
    .into_iter()
    .min_by_key(|corner| corner.1)
    .map_or(SeriesLabelPosition::UpperRight, |corner| corner.0);
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (720, 420)).into_drawing_area();
        root.fill(&WHITE).map_err(failed(title))?;
        let mut chart = ChartBuilder::on(&root)
            .caption(title, ("sans-serif", 18))
            .margin(12)
            .x_label_area_size(44)
            .y_label_area_size(60)
            .build_cartesian_2d(xs, ys)
            .map_err(failed(title))?;
        chart
            .configure_mesh()
            .x_desc(x)
            .y_desc(y)
            .light_line_style(WHITE)
            .draw()
            .map_err(failed(title))?;
        for (i, curve) in curves.iter().enumerate() {
            let colour = COLOURS[i % COLOURS.len()];
            let points: Vec<(f64, f64)> = curve.points.iter().filter(finite).copied().collect();
            // The same colour again: hollow dots, thinner lines.
            let again = i >= COLOURS.len();
            let width = if again { 1 } else { 2 };
            let line = LineSeries::new(points.clone(), colour.stroke_width(width));
            chart
                .draw_series(line)
                .map_err(failed(title))?
                .label(&curve.name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour.stroke_width(width)));
            let style = if again {
                colour.stroke_width(1)
            } else {
                colour.filled()
            };
            let dots = points.into_iter().map(|p| Circle::new(p, 3, style));
            chart.draw_series(dots).map_err(failed(title))?;
        }
        chart
            .configure_series_labels()
            .background_style(WHITE.mix(0.8))
            .border_style(BLACK.mix(0.2))
            .position(emptiest)
            .draw()
            .map_err(failed(title))?;
        root.present().map_err(failed(title))?;
    }
    Ok(svg)
}

/// A table of values as coloured cells.
#[derive(Debug, Clone, PartialEq)]
pub struct HeatMap<'a> {
    /// Heading.
    pub title: &'a str,
    /// Names of the axes.
    pub axes: (&'a str, &'a str),
    /// One name per column.
    pub columns: &'a [String],
    /// One name per row.
    pub rows: &'a [String],
    /// `rows x columns`, row-major; cells that are not finite stay white.
    pub values: &'a [f64],
    /// Values of the palest and the darkest cell.
    pub range: (f64, f64),
}

/// Draws `map`; the values stand in the cells where they are few enough to be read.
///
/// # Errors
/// When the drawing library fails, or `values` is not `rows x columns` long.
pub fn heat_map(map: &HeatMap<'_>) -> Result<String, PlotError> {
    let (rows, columns, title) = (map.rows.len(), map.columns.len(), map.title);
    if map.values.len() != rows * columns || map.values.is_empty() {
        return Err(failed(title)(format!(
            "{} values for {rows} x {columns} cells",
            map.values.len()
        )));
    }
    let cell = (760 / columns.max(1)).clamp(14, 72) as u32;
    let high = cell.min(28);
    let size = (columns as u32 * cell + 110, rows as u32 * high + 96);
    let written = cell >= 40 && high >= 14;
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        root.fill(&WHITE).map_err(failed(title))?;
        let mut chart = ChartBuilder::on(&root)
            .caption(title, ("sans-serif", 16))
            .margin(8)
            .x_label_area_size(40)
            .y_label_area_size(64)
            .build_cartesian_2d((0..columns).into_segmented(), (0..rows).into_segmented())
            .map_err(failed(title))?;
        let name = |names: &[String], v: &SegmentValue<usize>| match v {
            SegmentValue::CenterOf(i) | SegmentValue::Exact(i) => names.get(*i).cloned().unwrap_or_default(),
            SegmentValue::Last => String::new(),
        };
        chart
            .configure_mesh()
            .disable_mesh()
            .x_desc(map.axes.0)
            .y_desc(map.axes.1)
            .x_labels(columns.min(16))
            .y_labels(rows.min(32))
            .x_label_formatter(&|v| name(map.columns, v))
            .y_label_formatter(&|v| name(map.rows, v))
            .draw()
            .map_err(failed(title))?;
        let cells = map.values.iter().enumerate().filter(|(_, v)| v.is_finite());
        let squares = cells.clone().map(|(i, v)| {
            let (r, c) = (i / columns, i % columns);
            let corners = [
                (SegmentValue::Exact(c), SegmentValue::Exact(r)),
                (SegmentValue::Exact(c + 1), SegmentValue::Exact(r + 1)),
            ];
            Rectangle::new(corners, shade(*v, map.range).filled())
        });
        chart.draw_series(squares).map_err(failed(title))?;
        if written {
            let texts = cells.map(|(i, v)| {
                let at = (
                    SegmentValue::CenterOf(i % columns),
                    SegmentValue::CenterOf(i / columns),
                );
                let ink = if darkness(*v, map.range) > 0.55 {
                    WHITE
                } else {
                    BLACK
                };
                let style = ("sans-serif", 11).into_font().color(&ink);
                let centred = style.pos(plotters::style::text_anchor::Pos::new(
                    plotters::style::text_anchor::HPos::Center,
                    plotters::style::text_anchor::VPos::Center,
                ));
                Text::new(short(*v), at, centred)
            });
            chart.draw_series(texts).map_err(failed(title))?;
        }
        root.present().map_err(failed(title))?;
    }
    Ok(svg)
}

fn short(v: f64) -> String {
    if v.abs() >= 100.0 {
        format!("{v:.0}")
    } else {
        format!("{v:.2}")
    }
}

fn darkness(v: f64, (lo, hi): (f64, f64)) -> f64 {
    if hi > lo {
        ((v - lo) / (hi - lo)).clamp(0.0, 1.0)
    } else {
        0.0
    }
}

/// From nearly white to dark blue.
fn shade(v: f64, range: (f64, f64)) -> RGBColor {
    let t = darkness(v, range);
    let mix = |a: f64, b: f64| (a + (b - a) * t).round() as u8;
    RGBColor(mix(240.0, 8.0), mix(245.0, 48.0), mix(250.0, 107.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn curves_hold_their_names_and_leave_out_what_is_not_finite() {
        let c = Curve {
            name: "dense".into(),
            points: vec![(1.0, 0.5), (2.0, f64::NAN), (3.0, 0.75)],
        };
        let svg = curves("recall", ("tokens", "accuracy"), &[c]).expect("drawn");
        assert!(svg.starts_with("<svg") && svg.contains("dense") && svg.contains("accuracy"));
        assert_eq!(svg.matches("<circle").count(), 2);
        assert!(curves("nothing", ("x", "y"), &[]).is_ok());
    }

    #[test]
    fn a_heat_map_has_a_square_for_each_finite_value() {
        let names = |n: usize| (0..n).map(|i| format!("n{i}")).collect::<Vec<_>>();
        let (rows, columns) = (names(2), names(3));
        let map = HeatMap {
            title: "heads",
            axes: ("head", "layer"),
            columns: &columns,
            rows: &rows,
            values: &[0.0, 0.5, 1.0, f64::NAN, 0.25, 0.75],
            range: (0.0, 1.0),
        };
        let svg = heat_map(&map).expect("drawn");
        assert!(svg.contains("0.75") && svg.contains("heads"));
        assert!(
            heat_map(&HeatMap {
                values: &[1.0],
                ..map
            })
            .is_err()
        );
    }
}
