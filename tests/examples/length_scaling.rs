use super::{folder, has_share, json, path, succeeds};

#[test]
fn every_case_has_its_share_of_the_bound() {
    if !path("length_scaling").exists() {
        eprintln!("SKIPPED: length_scaling is built where the whole workspace is tested");
        return;
    }
    for (dtype, operations) in
        [("f32", "f32 multiply-adds"), ("bf16", "bf16 dot products"), ("f64", "f64 multiply-adds")]
    {
        let out = folder(&format!("length_scaling_{dtype}"));
        let run = ["--lengths", "64,128", "--samples", "3", "--dtype", dtype, "--out", out.to_str().unwrap()];
        let printed = succeeds("length_scaling", &run);
        let records = json(out.join("length_scaling.json"));
        let records = records.as_array().unwrap();
        assert_eq!(records.len(), 8 * 2);
        records.iter().for_each(has_share);
        // The work is the same in every run: its bound times its rate.
        let flops =
            |record: &serde_json::Value| record["gflops"].as_f64().unwrap() * record["median_ms"].as_f64().unwrap();
        for record in records.iter().filter(|record| record["bound_by"] == "flops") {
            let bound = record["bound_ms"].as_f64().unwrap() * record["bound_gflops"].as_f64().unwrap();
            assert!((bound / flops(record) - 1.0).abs() < 1e-6, "{record}");
        }
        assert!(printed.contains("of bound") && printed.contains("Bound: the longer of"), "{printed}");
        // Sums are f32 for 16 bits, where the processor has no faster products of them.
        assert!(printed.contains(operations) || (dtype != "f64" && printed.contains("f32 ")), "{printed}");
    }
}
