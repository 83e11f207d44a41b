//! The printed tables.

use comfy_table::Table;

use crate::common::Mechanism;
use crate::common::bound::Share;
use crate::common::table::table;
use crate::scaling::{Record, by_mechanism, crossover, growth_exponent};

pub fn cases(records: &[Record]) -> Table {
    let is_cpu = records.iter().all(|record| record.device == "cpu");
    let (flops_name, flops_unit) = if is_cpu { ("GFLOP/s", 1.0) } else { ("TFLOP/s", 1e3) };
    let mut header =
        vec!["mechanism", "length", "median ms", "tokens/s", flops_name, "GB/s", "extra MB", "worst error"];
    let has_bound = records.iter().any(|record| record.bound.is_some());
    if has_bound {
        header.push("of bound");
    }
    let mut table = table(&header, 1);
    for record in records {
        let mut row = vec![
            record.mechanism.to_string(),
            record.len.to_string(),
            format!("{:.3}", record.median_ms),
            format!("{:.3e}", record.tokens_per_s),
            format!("{:.1}", record.gflops / flops_unit),
            format!("{:.2}", record.gbytes_per_s),
            format!("{:.1}", record.peak_bytes as f64 / 1e6),
            format!("{:.1e}", record.max_rel_error),
        ];
        if has_bound {
            row.push(record.bound.as_ref().map_or("-".into(), Share::to_string));
        }
        table.add_row(row);
    }
    table
}

pub fn growth(records: &[Record]) -> Table {
    let softmax = by_mechanism(records).find(|(mechanism, _)| *mechanism == Mechanism::Softmax);
    let mut table =
        table(&["mechanism", "growth exponent, last two lengths", "faster than fused softmax from length"], 1);
    for (mechanism, records) in by_mechanism(records) {
        let crossover = match softmax {
            _ if mechanism.is_quadratic() => "-".into(),
            None => "softmax not run".into(),
            Some((_, softmax)) => crossover(records, softmax).map_or("-".into(), |length| length.to_string()),
        };
        let exponent = growth_exponent(records).map_or("-".into(), |exponent| format!("{exponent:.2}"));
        table.add_row([mechanism.name().to_string(), exponent, crossover]);
    }
    table
}
